"""One method on one layer touches few files and few functions: at most 5 and 15."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import tersenet
from tersenet.quantization.quantize import Quantize
from tersenet.task import Task

ROOT = str(Path(tersenet.__file__).parent)


def reached(job: Callable[[], Any]) -> set[tuple[str, str]]:
    """(file, function) of ours that ran. Comprehensions belong to the function around them."""
    seen: set[tuple[str, str]] = set()

    def look(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ROOT) and not code.co_name.startswith("<"):
            seen.add((code.co_filename, code.co_qualname if hasattr(code, "co_qualname") else code.co_name))

    before = sys.gettrace()
    sys.settrace(look)
    try:
        job()
    finally:
        sys.settrace(before)
    return seen


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def test_weights_to_int8() -> None:
    model, x = network(), torch.zeros(2, 64)
    task = Task(example=x)

    def convert() -> None:
        nonlocal model
        model, _ = Quantize(weights="int8", activations=None).run(model, task)

    found = reached(convert)
    assert len({file for file, _ in found}) <= 5, sorted(found)
    assert len(found) <= 15, sorted(found)
    assert "run" in {name.rpartition(".")[2] for _, name in found}  # it did look

    found = reached(lambda: model(x))
    assert len({file for file, _ in found}) <= 2, sorted(found)
    assert 1 < len(found) <= 7, sorted(found)
