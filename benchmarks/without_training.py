"""Accuracy of a cut ResNet-56 without any training, on the whole CIFAR-10 test set, and the seconds it took.

    python benchmarks/without_training.py --weights cifar10_resnet56.safetensors --data parquet:cifar10 \\
        --out benchmarks/results/without_training.json

At most 1,024 unlabelled training images are looked at: 768 to repair, 256 to judge the shares.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

from tersenet import PruneChannels, costs, open_model, open_task
from tersenet.deploy.machine import machine
from tersenet.task import score_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5, 1 / 2.57])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    network, preparation = open_model("resnet56", arguments.weights, 0)
    task = open_task(network, preparation, arguments.data, quiet=True)
    whole = sum(layer.macs for layer in costs(network, task.example))
    rows: list[dict[str, Any]] = []
    for share in arguments.macs:
        step = PruneChannels(macs=share, importance="reconstruction", scope="sensitivity")
        started = time.perf_counter()
        made, _ = step.run(copy.deepcopy(network), task)
        seconds = time.perf_counter() - started
        left = sum(layer.macs for layer in costs(made, task.example)) / whole
        found = score_model(made, task, task.test)
        rows.append(
            {
                "asked_macs": share, "macs_left": left, "fewer": 1 / left, "score": found.value,
                "score_interval": [found.low, found.high], "samples": found.samples, "seconds": seconds,
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
