"""ONNX files against the model, in both runtimes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import TASK, Mobile, Residual, X, lively
from torch import Tensor, nn

from tersenet.bricks.quantizer import Quantizer
from tersenet.deploy.left_in_float import left_in_float
from tersenet.deploy.onnx import export_onnx
from tersenet.errors import TersenetError, TraceError
from tersenet.quantization.quantize import Quantize
from tersenet.rewrite.settle import Settle
from tersenet.task import Preparation

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def in_onnxruntime(path: Path, x: Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options).run(None, {"input": x.numpy()})[0]


def in_openvino(path: Path, x: Tensor) -> np.ndarray:
    openvino = pytest.importorskip("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return openvino.Core().compile_model(str(path), "CPU", settings)(x.numpy())[0]


@pytest.fixture(scope="module", params=[Residual, Mobile])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model, _ = Quantize().run(lively(request.param()), TASK)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return model, export_onnx(model, X[:1], path)


@pytest.mark.parametrize("runtime", [in_onnxruntime, in_openvino])
def test_runtimes_compute_what_is_simulated(quantized: tuple[nn.Module, Path], runtime) -> None:
    model, path = quantized
    with torch.no_grad():
        simulated = model(X).numpy()
    # What one step of the last rounding in every value can do to an output: ties that fall the other way.
    last = [module for module in model.modules() if isinstance(module, Quantizer)][-1]
    final = model.get_submodule("linear" if hasattr(model, "linear") else "last")
    step = float(last.scale) * float(final.weight.detach().abs().sum(dim=1).max())
    assert step < 0.05 * float(np.abs(simulated).max())
    assert float(np.abs(runtime(path, X) - simulated).max()) <= step


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_nothing_is_left_in_float(quantized: tuple[nn.Module, Path], runtime: str) -> None:
    pytest.importorskip(runtime)
    assert left_in_float(quantized[1], runtime) == []


def test_how_the_numbers_are_stored(quantized: tuple[nn.Module, Path]) -> None:
    graph = onnx.load(quantized[1]).graph
    kinds = Counter(onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer)
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    weights = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert len(weights) == len(layers)
    assert kinds["INT32"] >= 1
    assert not [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1]
    assert not {node.op_type for node in graph.node} & {"BatchNormalization", "Relu", "Clip", "Slice", "Pad", "Cast"}
    contents = [(t.data_type, tuple(t.dims), t.raw_data) for t in graph.initializer if len(t.raw_data) <= 4]
    assert len(contents) == len(set(contents))


def test_an_operator_left_in_float_is_found(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardswish(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model, plan = Quantize().run(lively(model), TASK)
    path = export_onnx(model, X, tmp_path / "model.onnx")
    assert {name.split()[0] for name in left_in_float(path, "onnxruntime")} == {
        "HardSigmoid",
        "Mul",
    }  # what ORT makes of it
    assert ["Hardswish" in reason for reason in plan["float"].values()] == [True]


class Hard(nn.Module):
    """Hard activations in each form, with global pools behind them, which are told by the shapes before them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.swish, self.sigmoid = nn.Hardswish(inplace=True), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        x = self.swish(self.first(x))
        gate = nn.functional.hardsigmoid(self.second(x.mean((2, 3), keepdim=True)), inplace=True)
        gate = gate * self.sigmoid(nn.functional.hardswish(nn.functional.adaptive_avg_pool2d(x, 1)))
        return nn.functional.hardswish(x * gate, inplace=True).mean((2, 3))


def test_hard_activations_are_operators_of_onnx(tmp_path: Path) -> None:
    model = lively(Hard())
    path = export_onnx(model, X, tmp_path / "model.onnx")
    counts = Counter(node.op_type for node in onnx.load(path).graph.node)
    expected = {"Conv": 2, "HardSwish": 3, "HardSigmoid": 2, "GlobalAveragePool": 2, "Mul": 2}
    assert {name: count for name, count in counts.items() if name not in ("Reshape", "Flatten", "Squeeze")} == expected
    with torch.no_grad():
        np.testing.assert_allclose(in_onnxruntime(path, X[:5]), model(X[:5]).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [Residual, Mobile])
def test_float_file_and_dynamic_batch(make: type[nn.Module], tmp_path: Path) -> None:
    model = lively(make())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = export_onnx(model, X[:1], tmp_path / "model.onnx")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        for batch in (1, 6):
            expected = model(X[:batch]).numpy()
            np.testing.assert_allclose(in_onnxruntime(path, X[:batch]), expected, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(in_openvino(path, X[:batch]), expected, rtol=1e-4, atol=1e-4)
    graph = onnx.load(path).graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert [value.name for value in (*graph.input, *graph.output)] == ["input", "output"]
    assert {value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)} == {"batch"}


@pytest.mark.parametrize("settled", [False, True])
def test_weights_only_and_settled(settled: bool, tmp_path: Path) -> None:
    model, _ = Quantize(activations=None).run(lively(Residual()), TASK)
    if settled:
        model, _ = Settle().run(model, TASK)
    path = export_onnx(model, X, tmp_path / "model.onnx")
    with torch.no_grad():
        np.testing.assert_allclose(in_onnxruntime(path, X), model(X).numpy(), rtol=1e-4, atol=1e-4)
    whole = export_onnx(lively(Residual()), X, tmp_path / "float.onnx")
    assert operators_run(path, tmp_path) == operators_run(whole, tmp_path)  # weights are made once, at loading
    weights = sum(t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1 for t in onnx.load(path).graph.initializer)
    assert weights == 3
    assert (
        sum(t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1 for t in onnx.load(whole).graph.initializer) == 3
    )


def operators_run(path: Path, folder: Path) -> Counter[str]:
    """What is left of a file's operators after ONNX Runtime has optimised it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(path), options)
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize("rows", [False, True])
def test_float_weights_of_few_values_are_packed_to_the_bit(rows: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 40, 5), nn.Flatten(), nn.Linear(40 * 16, 24))
    for layer in (model[0], model[2]):
        with torch.no_grad():
            signs = torch.randint(-1, 2, layer.weight.shape).float() * -1.0  # zeros of both signs
            scales = torch.rand(len(signs)) if rows else torch.full((len(signs),), 0.3)
            layer.weight.copy_(signs * scales.reshape(-1, *(1,) * (signs.dim() - 1)))
    assert share_of_bytes_when_packed(model, tmp_path) < 0.25


@pytest.mark.parametrize("format", ["int4", "int2"])
def test_integers_are_packed_and_fused_as_if_they_were_not(format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 5))
    model, _ = Quantize(weights=format).run(net.eval(), TASK)
    assert share_of_bytes_when_packed(model, tmp_path) < 0.8


def share_of_bytes_when_packed(model: nn.Module, folder: Path) -> float:
    """Of a file with packed weights, which runs as the same operators to the same bits in both runtimes."""
    packed = export_onnx(model, X, folder / "packed.onnx")
    plain = export_onnx(model, X, folder / "plain.onnx", pack=False)
    assert np.array_equal(in_onnxruntime(packed, X), in_onnxruntime(plain, X))
    assert np.array_equal(in_openvino(packed, X), in_openvino(plain, X))
    assert operators_run(packed, folder) == operators_run(plain, folder)
    assert layers_in_openvino(packed) == layers_in_openvino(plain)
    return packed.stat().st_size / plain.stat().st_size


def layers_in_openvino(path: Path) -> Counter[str]:
    openvino = pytest.importorskip("openvino")
    graph = openvino.Core().compile_model(str(path), "CPU").get_runtime_model()
    return Counter(str(node.get_rt_info()["layerType"].value) for node in graph.get_ops())


def test_metadata(tmp_path: Path) -> None:
    preparation = Preparation(size=(8, 8), mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), labels=("cat", "dög"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    path = export_onnx(model, X, tmp_path / "model.onnx", preparation, {"made.by": "a test"})
    stored = onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
    assert json.loads(stored["tersenet.mean"]) == [0.1, 0.2, 0.3]
    assert json.loads(stored["tersenet.std"]) == [1.0, 2.0, 3.0]
    assert json.loads(stored["tersenet.size"]) == [8, 8]
    assert json.loads(stored["tersenet.labels"]) == ["cat", "dög"]
    assert stored["made.by"] == "a test"


def test_nothing_half_written_and_nothing_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Forked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match="Forked"):
        export_onnx(Forked(), X, tmp_path / "model.onnx")
    (tmp_path / "file").mkdir()
    with pytest.raises(TersenetError, match="cannot be written"):
        export_onnx(nn.Flatten(), X, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    capfd.readouterr()
    export_onnx(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), X, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
