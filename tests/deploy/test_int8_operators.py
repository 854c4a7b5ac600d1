"""int8 of operators that OpenVINO computes wrong or refuses when they are written as they come, in both runtimes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.bricks.settle import settle
from tersenet.deploy.checked import checked
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.reference import Reference
from tersenet.quantization.quantize import Quantize
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


class Between(nn.Module):
    """A function of a convolution's output, in front of another one."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.stem, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.more = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self, self.stem(x))).flatten(1)


def attended(net: nn.Module, x: Tensor) -> Tensor:
    """The spatial attention of CBAM (Woo et al., ECCV 2018)."""
    return x * torch.sigmoid(net.more["conv"](torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))


# OpenVINO loses a bias in some of these as they come, with some weights.
BETWEEN = {
    "spatial attention": Between(attended, conv=nn.Conv2d(2, 1, 7, padding=3)),
    "product with a deviation": Between(lambda net, x: F.gelu(x) * x.std((2, 3), keepdim=True)),
    "product with a maximum": Between(lambda net, x: x * x.flatten(2).amax(2)[:, :, None, None]),
    "padding behind a ReLU": Between(lambda net, x: F.pad(x.relu(), (1, 2, 1, 2))),
    "padding with infinity": Between(lambda net, x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 3, 2)),
    "clipped to both sides": Between(lambda net, x: F.hardtanh(x)),
    "clipped from below": Between(lambda net, x: x.clamp(min=-0.1)),
    "clipped from above": Between(lambda net, x: x.clamp(max=0.3)),
    "two ReLUs of one": Between(lambda net, x: x.relu() * torch.sigmoid(x.relu())),
    "mean that cancels": Between(lambda net, x: x + F.instance_norm(x).mean((2, 3), keepdim=True)),
}

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


@pytest.mark.parametrize("model", BETWEEN.values(), ids=BETWEEN)
def test_what_is_between_convolutions_is_written_so_that_it_is_right(model: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    task = Task(example=x[:2], calibrate=[x], quiet=True)
    simulated = settle(Quantize(samples=16).run(copy.deepcopy(model).eval(), task)[0])
    path = tmp_path / "q.onnx"

    def write(floats: Sequence[str] = ()) -> Path:
        return export_onnx(simulated, x[:2], path, floats=floats)

    write()
    found = checked(path, ["onnxruntime", "openvino"], Reference(simulated, x[:2], [x]), write)
    assert found["openvino"].agrees
    assert found["onnxruntime"].agrees
    assert found["onnxruntime"].in_float == ()
