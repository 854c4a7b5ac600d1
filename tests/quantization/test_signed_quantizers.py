"""Quantizers of the input and of what is added up: around 0 where that costs little, and int8 in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tersenet.bricks.quantizer import Quantizer
from tersenet.deploy.onnx import export_onnx
from tersenet.numerics.ranges import affine, centred
from tersenet.quantization.quantize import Quantize
from tersenet.task import Task

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def quantized(low: float, high: float, bits: str = "int8") -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)).eval()
    x = torch.rand(16, 3, 8, 8) * (high - low) + low
    x[0, 0, 0, :2] = torch.tensor([low, high])
    task = Task(example=x[:1], calibrate=[(x,)], quiet=True)
    model, _ = Quantize(ranges="minmax", activations=bits).run(net, task)
    return model, x


def quantizers(model: nn.Module) -> list[Quantizer]:
    return [module for module in model.modules() if isinstance(module, Quantizer)]


def first_type(path: Path) -> int:
    graph = onnx.load(path).graph
    node = next(node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "input")
    return next(int(t.data_type) for t in graph.initializer if t.name == node.input[2])


@pytest.mark.parametrize(("low", "high"), [(-2.0, 2.4), (-2.4, 2.0), (-1.0, 1.0)])
def test_a_range_about_0_gets_its_middle_there(low: float, high: float, tmp_path: Path) -> None:
    model, x = quantized(low, high)
    first, second = quantizers(model)[:2]
    assert int(first.zero_point) == 128
    assert -128 * float(first.scale) <= low + 1e-6
    assert 127 * float(first.scale) >= high - 1e-6
    assert float(first.scale) <= 1.2 * affine(low, high)[0] + 1e-9
    assert int(second.zero_point) != 128  # only the input is bent
    path = export_onnx(model, x[:1], tmp_path / "model.onnx")
    assert first_type(path) == onnx.TensorProto.INT8
    with torch.no_grad():
        simulated = model(x).numpy()
    given = onnxruntime.InferenceSession(str(path)).run(None, {"input": x.numpy()})[0]
    assert np.abs(given - simulated).max() <= 0.02 * np.abs(simulated).max()


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.3, 2.0), (-3.0, -1.0)])
def test_other_ranges_stay_tight(low: float, high: float, tmp_path: Path) -> None:
    model, x = quantized(low, high)
    first = quantizers(model)[0]
    scale, zero_point = affine(low, high)
    assert (float(first.scale), int(first.zero_point)) == (pytest.approx(scale), zero_point)
    assert first_type(export_onnx(model, x[:1], tmp_path / "model.onnx")) == onnx.TensorProto.UINT8


class Adds(nn.Module):
    """The second convolution's result is added to the first's, and read by nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x).relu()
        return self.last(self.two(y) + y)


def test_what_is_only_added_up_lies_around_0(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    model, _ = Quantize().run(Adds().eval(), Task(example=x[:1], calibrate=[(x,)], quiet=True))
    zeros = {name: int(module.zero_point) for name, module in model.named_modules() if isinstance(module, Quantizer)}
    around = [name for name, zero in zeros.items() if zero == 128]
    assert len(around) == 2, zeros  # the input, and what is added to the rectified values
    assert any("two" in name for name in around), zeros
    path = export_onnx(model, x[:1], tmp_path / "model.onnx")
    graph = onnx.load(path).graph
    types = [t.data_type for t in graph.initializer for node in graph.node
             if node.op_type == "QuantizeLinear" and node.input[2] == t.name]  # fmt: skip
    assert types.count(onnx.TensorProto.INT8) == 2
    with torch.no_grad():
        simulated = model(x).numpy()
    given = onnxruntime.InferenceSession(str(path)).run(None, {"input": x.numpy()})[0]
    assert np.abs(given - simulated).max() <= 0.02 * np.abs(simulated).max()


def test_only_eight_bits_are_bent() -> None:
    model, _ = quantized(-2.0, 2.4, "int4")
    assert int(quantizers(model)[0].zero_point) == affine(-2.0, 2.4, 4)[1]


def test_ranges_of_nothing() -> None:
    assert centred(0.0, 0.0) is None
