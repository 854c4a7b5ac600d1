"""Pre-activation networks in int8: the sums that batch norms read are rounded, where one grid fits their channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.bricks.quantizer import Quantizer
from tersenet.bricks.settle import settle
from tersenet.deploy.left_in_float import left_in_float
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.openvino import export_openvino
from tersenet.deploy.runtimes import open_file
from tersenet.graph.norms import fits_one_grid
from tersenet.quantization.quantize import Quantize
from tersenet.task import Task

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

X = torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A stem and two blocks: norm, ReLU, convolution, norm, ReLU, convolution, and the sum with what went in."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(5))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(4))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in range(2):
            y = self.convolutions[2 * block](F.relu(self.norms[2 * block](x)))
            x = x + self.convolutions[2 * block + 1](F.relu(self.norms[2 * block + 1](y)))
        return self.head(F.relu(self.norms[4](x)).mean((2, 3)))


class Dense(nn.Module):
    """A norm over a concatenation, as in a DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(16)
        self.inner, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.last(F.relu(self.norm(torch.cat([x, self.inner(x)], 1))))


class TwoReaders(nn.Module):
    """An input around 0 that two convolutions read."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.one(x)) + F.relu(self.two(x)))


def with_statistics(model: nn.Module) -> nn.Module:
    """Statistics of X, and scales that are not all alike, one of them negative."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            with torch.no_grad():
                module.weight[0] = -0.7
    model.train()
    with torch.no_grad():
        model(X)
    return model.eval()


def quantized(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    task = Task(example=X[:2], calibrate=[(X,)], quiet=True)
    found, plan = Quantize().run(model, task)
    return settle(found.eval()), plan


def rounded(plan: dict[str, Any]) -> set[str]:
    return {name for group in plan["points"].values() for name in group}


def types(path: Path) -> dict[str, list[Any]]:
    """The operators in front of each rounding -> the types that they are rounded to."""
    graph = onnx.load(path).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    found: dict[str, list[Any]] = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            found.setdefault(makers.get(node.input[0], "input"), []).append(kinds[node.input[2]])
    return found


def test_sums_in_front_of_norms_are_rounded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, plan = quantized(with_statistics(Net()))
    assert {"add_tensor", "add_tensor_1"} <= rounded(plan)
    with torch.no_grad():
        wanted = model(X).numpy()
    for runtime in ("onnxruntime", "openvino"):
        pytest.importorskip(runtime)
        path = export_onnx(model, X[:2], tmp_path / "model.onnx")
        found = open_file(path, runtime, threads=1).run(X.numpy())
        assert np.abs(found - wanted).max() <= 0.03 * np.abs(wanted).max()
    kinds = {each.split()[0] for each in left_in_float(tmp_path / "model.onnx", "onnxruntime")}
    assert kinds == {"BatchNormalization"}


def test_openvino_leaves_nothing_in_float(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    model, _ = quantized(with_statistics(Net()))
    path = export_openvino(model, X[:2], tmp_path / "model.xml")
    assert left_in_float(path, "openvino") == []
    with torch.no_grad():
        wanted = model(X).numpy()
    found = open_file(path, "openvino", threads=1).run(X.numpy())
    assert np.abs(found - wanted).max() <= 0.03 * np.abs(wanted).max()


def test_sums_lie_around_0_and_are_int8_where_the_runtime_can(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, _ = quantized(with_statistics(Net()))
    grids = {path.rpartition(".")[2]: each for path, each in model.named_modules() if isinstance(each, Quantizer)}
    assert [int(grids[name].zero_point) for name in ("add_tensor_out", "add_tensor_1_out")] == [128, 128]
    both = types(export_onnx(model, X[:2], tmp_path / "both.onnx"))
    # The first sum is read by a norm and an addition, the second by a norm alone.
    assert both["Add"] == [onnx.TensorProto.UINT8, onnx.TensorProto.INT8]
    alone = types(export_onnx(model, X[:2], tmp_path / "alone.onnx", shared_int8=True))
    assert alone["Add"] == [onnx.TensorProto.INT8] * 2


def test_channels_that_one_grid_does_not_fit_stay_float() -> None:
    torch.manual_seed(0)
    model = with_statistics(Net())
    with torch.no_grad():  # half of the channels of the last sum have a thousandth of the others' size
        model.norms[4].running_var[8:] *= 1e-6  # type: ignore[index, union-attr]
    _, plan = quantized(model)
    assert "add_tensor" in rounded(plan)
    assert "add_tensor_1" not in rounded(plan)


@pytest.mark.parametrize(("small", "fits"), [(1.0, True), (1e-2, True), (1e-6, False), (0.0, True)])
def test_what_fits_one_grid(small: float, fits: bool) -> None:
    norm = nn.BatchNorm2d(8)
    norm.running_var[:2] = small
    assert fits_one_grid(norm) is fits


def test_a_norm_of_nothing_or_of_nan_fits_no_grid() -> None:
    norm = nn.BatchNorm2d(2)
    norm.running_var.zero_()
    assert not fits_one_grid(norm)
    norm.running_var.fill_(float("nan"))
    assert not fits_one_grid(norm)


def test_a_concatenation_in_front_of_a_norm_stays_float() -> None:
    torch.manual_seed(0)
    _, plan = quantized(with_statistics(Dense()))
    assert not [name for name in rounded(plan) if name.startswith("cat")]


def test_an_input_that_several_layers_read_is_uint8(tmp_path: Path) -> None:
    """As int8 ONNX Runtime would leave the layers in float."""
    torch.manual_seed(0)
    model, _ = quantized(TwoReaders().eval())
    path = export_onnx(model, X[:2], tmp_path / "model.onnx")
    assert types(path)["input"] == [onnx.TensorProto.UINT8]
    assert left_in_float(path, "onnxruntime") == []
