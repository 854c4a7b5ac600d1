"""What runtimes leave in float: made-up graphs, and the networks that must be fused wholly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nets import TASK, Residual, X, lively
from torch import Tensor, nn

from tersenet.deploy.left_in_float import READERS, Operator, between, integer_operators, left_in_float
from tersenet.deploy.onnx import export_onnx
from tersenet.errors import SettingsError
from tersenet.models.cifar_resnet import resnet20
from tersenet.models.mobilenet_v2 import MobileNetV2
from tersenet.quantization.quantize import Quantize
from tersenet.task import Task

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))
IMAGE_TASK = Task(example=IMAGES[:2], calibrate=[(IMAGES, torch.zeros(8))], quiet=True)


def chain(*kinds: str) -> list[Operator]:
    """A chain of operators; "q" is an integer one, "m" moves, anything else computes in float."""
    return [
        Operator(kind, str(i), [str(i)], [str(i + 1)], kind == "q", moves=kind == "m") for i, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize(
    ("kinds", "left"),
    [
        ("qqq", []),
        ("fqqf", []),  # before the first and after the last rounding
        ("qfq", ["f 1"]),
        ("qfgq", ["f 1", "g 2"]),
        ("qmq", []),
        ("qfmgq", ["f 1", "g 3"]),
        ("ff", []),
    ],
)
def test_between(kinds: str, left: list[str]) -> None:
    assert between(chain(*kinds)) == left


def test_a_branch_that_is_not_rounded_again_does_not_count() -> None:
    fork = [*chain("q", "f"), Operator("q", "other", ["1"], ["9"], integer=True)]
    assert between(fork) == []
    assert between([*fork, Operator("q", "join", ["2", "9"], ["10"], integer=True)]) == ["f 1"]


@pytest.mark.minutes
@pytest.mark.parametrize("make", [resnet20, lambda: MobileNetV2(10, width=0.35)], ids=["resnet20", "mobilenet_v2"])
def test_networks_are_fused_wholly(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, plan = Quantize(ranges="minmax").run(lively(make()), IMAGE_TASK)
    assert plan["float"] == {}
    path = export_onnx(model, IMAGES[:1], tmp_path / "model.onnx")
    for runtime in ("onnxruntime", "openvino"):
        pytest.importorskip(runtime)
        assert left_in_float(path, runtime) == []
        layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
        assert integer_operators(path, runtime) >= layers


class Odd(nn.Module):
    """An operator without an integer kernel between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.gelu(self.first(x)))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_operator_in_float_is_named(runtime: str, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    model, plan = Quantize().run(lively(Odd()), TASK)
    left = left_in_float(export_onnx(model, X[:1], tmp_path / "model.onnx"), runtime)
    assert left  # OpenVINO merges the GELU with the convolution, which then gives floats that it rounds apart
    assert runtime == "openvino" or all("gelu" in each.lower() for each in left), left
    assert any("gelu" in reason for reason in plan["float"].values())


def test_a_float_file_has_no_integer_operators(tmp_path: Path) -> None:
    path = export_onnx(lively(Residual()), X[:1], tmp_path / "model.onnx")
    assert integer_operators(path, "onnxruntime") == 0
    assert left_in_float(path, "onnxruntime") == []


def test_a_runtime_that_does_not_tell() -> None:
    with pytest.raises(SettingsError, match=f"what pytorch leaves in float cannot be read.*{', '.join(READERS)}"):
        left_in_float("model.pt2", "pytorch")
