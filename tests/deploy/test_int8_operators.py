"""int8 of operators that OpenVINO computes wrong or refuses when they are written as they come, in both runtimes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.bricks.settle import settle
from tersenet.deploy.checked import checked
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.reference import Reference
from tersenet.quantize.quantize import Quantize
from tersenet.task import Task


class Pooled(nn.Module):
    """A maximum behind a float convolution (1-D) and behind an integer one (2-D)."""

    def __init__(self, pool: nn.Module, dims: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = (nn.Conv1d if dims == 1 else nn.Conv2d)(3, 8, 3)
        self.pool, self.flat, self.head = pool, nn.Flatten(), nn.LazyLinear(4)
        self(torch.zeros(1, 3, *[8] * dims))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(self.pool(self.stem(x))))


class Positions(nn.Module):
    """Position embeddings that are looked up by a range."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.positions, self.head = nn.Linear(3, 8), nn.Embedding(6, 8), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.stem(x) + self.positions(torch.arange(6))).flatten(1))


class TopTwo(nn.Module):
    """Values that are one of several results, in front of an integer layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.max_pool2d(self.stem(x), 2, return_indices=True)[0]).mean((2, 3))


CASES = {
    "adaptive max pool, 1-D": (Pooled(nn.AdaptiveMaxPool1d(2), 1), (3, 8)),
    "adaptive max pool, windows that differ": (Pooled(nn.AdaptiveMaxPool2d(4), 2), (3, 8, 8)),
    "position embeddings": (Positions(), (6, 3)),
    "one of several results": (TopTwo(), (3, 8, 8)),
}


@pytest.mark.parametrize(("model", "shape"), CASES.values(), ids=CASES)
def test_the_file_is_what_was_simulated(model: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.randn(16, *shape, generator=torch.Generator().manual_seed(0))
    task = Task(example=x[:2], calibrate=[x], quiet=True)
    simulated = settle(Quantize(samples=16).run(copy.deepcopy(model).eval(), task)[0])
    path = export_onnx(simulated, x[:2], tmp_path / "q.onnx")
    assert set(checked(path, ["onnxruntime", "openvino"], Reference(simulated, x[:2], [x]))) == {
        "onnxruntime", "openvino"
    }  # fmt: skip
