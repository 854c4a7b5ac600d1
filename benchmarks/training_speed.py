"""What the settings of `train` gain on this machine: seconds of a batch in fp32, in bf16, and compiled, in turns.

    python benchmarks/training_speed.py binary_resnet20 --compile
    python benchmarks/training_speed.py mobilenet_v2_cifar_half

Random images, batch 128, SGD, channels last, as `train` does it; bf16 once more without the faster gradient of strided
depthwise layers. Writes benchmarks/results/training_speed_MODEL.json. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.deploy.machine import machine
from tersenet.sources import open_model
from tersenet.train.compiled import while_compiled
from tersenet.train.depthwise import faster_depthwise

RESULTS = Path(__file__).parent / "results"


def trainer(model: nn.Module, x: Tensor, y: Tensor, mixed: bool, around: Callable[[nn.Module], Any]) -> Any:
    """Trains a copy of the model on one batch, again and again: yields the seconds of each."""
    twin = copy.deepcopy(model).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(twin.parameters(), 0.01, 0.9)
    with around(twin):
        while True:
            start = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                loss = nn.functional.cross_entropy(twin(x).float(), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            yield time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="one of tersenet's, such as binary_resnet20")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="also through torch.compile, which takes a minute")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model, _ = open_model(arguments.model)
    x = torch.randn(128, 3, arguments.size, arguments.size).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (128,))
    contenders = {
        "fp32": trainer(model, x, y, False, faster_depthwise),
        "bf16, PyTorch's depthwise gradient": trainer(model, x, y, True, contextlib.nullcontext),
        "bf16": trainer(model, x, y, True, faster_depthwise),
    }
    if arguments.compile:
        contenders["bf16, compiled"] = trainer(model, x, y, True, partial(while_compiled, wanted=True))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(arguments.turns + 2):
        for name, batches in contenders.items():
            spent = next(batches)
            if turn >= 2:  # the first ones compile and fill caches
                seconds[name].append(spent)
    rows = {}
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(seconds["fp32"], found, strict=True)]
        rows[name] = {"seconds": statistics.median(found), "speedup_over_fp32": statistics.median(ratios)}
        print(f"{name:36} {rows[name]['seconds']:7.3f} s a batch  {rows[name]['speedup_over_fp32']:.2f}x of fp32")
    out = RESULTS / f"training_speed_{arguments.model}.json"
    settings = {"model": arguments.model, "batch": list(x.shape), "threads": arguments.threads}
    text = json.dumps({"schema": 1, **settings, "turns": arguments.turns, "machine": machine(), "rows": rows}, indent=1)
    out.write_text(text + "\n", encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
