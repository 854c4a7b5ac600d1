"""How small and how fast the codec is, form by form, on weights that were rounded, made sparse or made ternary.

    python benchmarks/codec_speed.py CASE... [--out FILE.json]

A CASE is WEIGHTS:KIND[:AMOUNT]. WEIGHTS is a .safetensors file, or `vgg16` for the CIFAR-10 VGG-16 with random weights
(nothing to foretell: the worst case). KIND is `grid` (rounded to AMOUNT standard deviations of each layer; 0.7 is about
2.4 bits), `sparse` (that share of each layer is 0, the rest rounded to half its deviation) or `ternary` (0.7 times the
mean magnitude is the threshold). Prints the bytes with some forms of numbers alone and with the smallest of all, and
megabytes of float32 a second of processor time on one thread, the best of three. It does not say what the change does
to a network's score.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tersenet.codec import container
from tersenet.deploy.machine import machine
from tersenet.models import build

FORMS = ("huffman", "relative", "contexts", "predicted")


def seconds(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def weights(source: str) -> dict[str, Tensor]:
    if source == "vgg16":
        torch.manual_seed(0)
        found: dict[str, Tensor] = {n: p.detach() for n, p in build("vgg16_bn_cifar").named_parameters()}
    else:
        found = load_file(source)
    return {name: weight for name, weight in found.items() if weight.ndim > 1}


def changed(weight: Tensor, kind: str, amount: float) -> Tensor:
    if kind == "ternary":
        kept = weight.abs() > 0.7 * weight.abs().mean()
        return weight.sign() * kept * weight.abs()[kept].mean() + 0.0
    step = weight.std() * amount
    if kind == "sparse":
        threshold = weight.abs().flatten().kthvalue(max(1, int(amount * weight.numel()))).values
        weight, step = weight * (weight.abs() > threshold), weight.std() / 2
    return (weight / step).round() * step + 0.0


def measured(case: str) -> dict[str, Any]:
    source, kind, *amount = case.split(":")
    tensors = {name: changed(weight, kind, float((amount or ["0"])[0])) for name, weight in weights(source).items()}
    total = sum(weight.nbytes for weight in tensors.values())
    row: dict[str, Any] = {"case": f"{Path(source).stem}:{kind}" + "".join(f":{a}" for a in amount), "float32": total}
    row["bytes"] = {}
    for form in FORMS:
        # What is no kernel has no predicted form.
        forms = (form, "contexts") if form == "predicted" else (form,)
        row["bytes"][form] = len(container.pack({}, tensors, forms=forms))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.terse"
        container.write(file, {}, tensors)
        row["bytes"]["smallest"] = file.stat().st_size
        row["encode_mb_per_s"] = round(total / seconds(lambda: container.pack({}, tensors)) / 1e6, 1)
        row["decode_mb_per_s"] = round(total / seconds(lambda: container.read(file)) / 1e6, 1)
    return row


def main(arguments: list[str]) -> None:
    out = arguments.pop(arguments.index("--out") + 1) if "--out" in arguments else None
    torch.set_num_threads(1)
    rows = []
    for case in (argument for argument in arguments if argument != "--out"):
        rows.append(measured(case))
        print(json.dumps(rows[-1]), flush=True)
    if out is not None:
        Path(out).write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
