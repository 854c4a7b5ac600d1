"""A miss is found down to its operator, in the model's own names, and worked around where it can be."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import tersenet.deploy.checked
import tersenet.deploy.onnx
from tersenet.bricks.settle import settle
from tersenet.deploy.checked import checked
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.reference import Reference
from tersenet.errors import ExportError
from tersenet.quantization.quantize import Quantize
from tersenet.task import Task

X = torch.randn(12, 4, 11, 9, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.pool = nn.Conv2d(4, 8, 3, padding=1), nn.AvgPool2d(2, ceil_mode=True)
        self.head = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(F.relu(self.stem(x))))


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2, ceil_mode=True) * 0.5


def planted(graph: fx.GraphModule) -> None:
    """An exporter that writes another pool."""
    if any(name == "pool" for name, _ in graph.named_modules()):
        graph.add_submodule("pool", Half())


@pytest.mark.parametrize("int8", [False, True])
def test_the_first_operator_that_differs_is_named(int8, monkeypatch, tmp_path):
    model: nn.Module = Net().eval()
    if int8:
        model = settle(Quantize().run(model, Task(example=X[:2], calibrate=[X], quiet=True))[0])
    right = tersenet.deploy.onnx.drop_repeated_clips

    def wrong(graph: fx.GraphModule) -> None:
        right(graph)
        planted(graph)

    monkeypatch.setattr(tersenet.deploy.onnx, "drop_repeated_clips", wrong)
    path = export_onnx(model, X[:2], tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"does not agree .* it differs first at pool \(AvgPool2d\)"):
        checked(path, ["onnxruntime"], Reference(model, X[:2], [X]))
    assert not path.exists()


def test_what_is_wrong_in_integers_is_left_in_float(monkeypatch, tmp_path):
    """ONNX Runtime's integer AveragePool is wrong with ceil_mode, and is written as it is here."""
    monkeypatch.setattr(tersenet.deploy.onnx, "rewrite_average_pools", lambda graph, quantized: None)
    monkeypatch.setattr(tersenet.deploy.onnx, "decompose", lambda program, rounds: program)
    model = settle(Quantize().run(Net().eval(), Task(example=X[:2], calibrate=[X], quiet=True))[0])
    reference = Reference(model, X[:2], [X])
    path = export_onnx(model, X[:2], tmp_path / "model.onnx")
    found = checked(path, ["onnxruntime"], reference, lambda floats: export_onnx(model, X[:2], path, floats=floats))[
        "onnxruntime"
    ]
    assert found.in_float == ("pool (AvgPool2d)",)
    assert found.steps is not None
    assert found.steps.beyond < 1e-3
    path = export_onnx(model, X[:2], path)
    with pytest.raises(ExportError, match=r"does not agree.*it differs first at pool \(AvgPool2d\)"):
        checked(path, ["onnxruntime"], reference)


class Deviating(nn.Module):
    """OpenVINO loses the bias of the convolution in front of what deviates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.gelu(x) * x.std((2, 3), keepdim=True)).mean((2, 3))


class Spread(nn.Module):
    """The same, of a mean that is spread over a computed shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x.mean((2, 3), keepdim=True).expand(x.shape)).relu().mean((2, 3))


@pytest.mark.parametrize(("kind", "shown"), [(Deviating, True), (Spread, True), (Spread, False)])
def test_a_bias_that_openvino_loses_is_added_apart(kind, shown, monkeypatch, tmp_path):
    """Also where the file is right while its integers are shown, so that its convolutions have to be tried."""
    if not shown:
        monkeypatch.setattr(tersenet.deploy.checked, "_culprits", lambda agreement, reference: [])
    model = settle(Quantize().run(kind().eval(), Task(example=X[:2], calibrate=[X], quiet=True))[0])
    reference = Reference(model, X[:2], [X])
    path = export_onnx(model, X[:2], tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="does not agree"):
        checked(path, ["openvino"], reference)
    rewritten = export_onnx(model, X[:2], path)
    found = checked(
        path, ["onnxruntime", "openvino"], reference, lambda floats: export_onnx(model, X[:2], rewritten, floats=floats)
    )
    assert found["openvino"].in_float == ("stem (Int8Conv2d)",)
    assert all(each.agrees for each in found.values())


def test_a_runtime_that_ends_its_process_is_said(monkeypatch, tmp_path):
    """OpenVINO crashes at some int8 graphs; the file is opened in a process of its own first."""
    pytest.importorskip("openvino")
    model = settle(Quantize().run(Net().eval(), Task(example=X[:2], calibrate=[X], quiet=True))[0])
    path = export_onnx(model, X[:2], tmp_path / "model.onnx")
    (tmp_path / "openvino.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ExportError, match=r"model\.onnx in openvino was killed by SIGSEGV while it was opened"):
        checked(path, ["openvino"], Reference(model, X[:2], [X]))
    assert not path.exists()
