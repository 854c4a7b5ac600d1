"""Weights of few bits in ONNX files: the same numbers in both runtimes, and as many bytes as promised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tersenet.deploy.left_in_float import left_in_float
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.runtimes import open_file
from tersenet.quantization.quantize import Quantize
from tersenet.task import Task

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
TASK = Task(example=X[:2], calibrate=[(X, torch.zeros(6))], quiet=True)
FORMATS = ("int2", "int3", "int5", "int7", "int8", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "pot3", "pot5", "kmeans1",
           "kmeans3", "kmeans8", "ternary", "binary1", "binary4", "pq")  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    depthwise = nn.Conv2d(5, 5, 3, groups=5, bias=False)
    return nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), depthwise, nn.Flatten(), nn.Linear(180, 7)).eval()


def check(model: nn.Module, path: Path, runtime: str, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        wanted = model(X).numpy()
    got = open_file(path, runtime).run(X.numpy())
    assert float(np.abs(got - wanted).max()) <= tolerance * float(np.abs(wanted).max())


@pytest.mark.parametrize("weights", FORMATS)
def test_the_file_computes_with_the_same_weights(weights: str, tmp_path: Path) -> None:
    model, _ = Quantize(weights=weights, activations=None).run(net(), TASK)
    path = export_onnx(model, X[:2], tmp_path / "model.onnx")
    check(model, path, "onnxruntime")


@pytest.mark.parametrize("weights", ["int3", "fp16", "bf16", "fp8_e4m3", "pot4", "kmeans4", "binary3", "pq"])
def test_openvino_computes_with_them_too(weights: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model, _ = Quantize(weights=weights, activations=None).run(net(), TASK)
    check(model, export_onnx(model, X[:2], tmp_path / "model.onnx"), "openvino", 1e-4)


@pytest.mark.parametrize(
    "settings", [{"granularity": "tensor"}, {"granularity": 7}, {"granularity": 7, "symmetric": False}]
)
def test_grids_of_other_granularity(settings: dict, tmp_path: Path) -> None:
    for weights in ("int4", "int8"):
        model, _ = Quantize(weights=weights, activations=None, **settings).run(net(), TASK)
        check(model, export_onnx(model, X[:2], tmp_path / "model.onnx"), "onnxruntime")


@pytest.mark.parametrize(("weights", "bits"), [("int4", 4), ("kmeans3", 3), ("ternary", 2), ("binary1", 1), ("pq", 2)])
def test_a_weight_takes_the_bits_that_were_promised(weights: str, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 512, bias=False))
    few = export_onnx(model, X[:2], tmp_path / "float.onnx").stat().st_size - 512 * 192 * 4
    model, _ = Quantize(weights=weights, activations=None, **({"pieces": 64} if weights == "pq" else {})).run(
        model, TASK
    )
    path = export_onnx(model, X[:2], tmp_path / "model.onnx")
    tables = 9_000  # those of digits, scales of 512 outputs, the operators
    assert path.stat().st_size - few <= 512 * 192 * bits / 8 + tables
    assert not [n for n in onnx.load(path).graph.node if n.domain not in ("", "ai.onnx")]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_four_bits_in_integer_arithmetic_are_packed_and_fused(runtime: str, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 7)
    )
    sizes = {}
    for weights in ("int8", "int4"):
        made, _ = Quantize(weights=weights).run(model, TASK)
        path = export_onnx(made, X[:2], tmp_path / f"{weights}.onnx")
        check(made, path, runtime, 0.02)
        assert left_in_float(path, "onnxruntime") == []
        sizes[weights] = path.stat().st_size
    assert sizes["int4"] < 0.65 * sizes["int8"]
