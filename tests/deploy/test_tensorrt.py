"""Files for TensorRT: the rules, each broken once, and the numbers against the symmetric simulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import TASK, Mobile, Residual, X, lively
from torch import Tensor, nn

from tersenet.bricks.quantizer import Quantizer
from tersenet.deploy.tensorrt import SymmetricQuantizer, broken_rules, export_tensorrt, symmetric
from tersenet.errors import ExportError
from tersenet.quantization.quantize import Quantize

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def run(path: Path, x: Tensor) -> np.ndarray:
    """What the file says, operator by operator: nothing is fused."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options).run(None, {"input": x.numpy()})[0]


@pytest.fixture(scope="module", params=[Residual, Mobile])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model, _ = Quantize().run(lively(request.param()), TASK)
    return model, export_tensorrt(model, X[:1], tmp_path_factory.mktemp("tensorrt") / "model.onnx")


def test_the_file_computes_the_symmetric_simulation(written: tuple[nn.Module, Path]) -> None:
    model, path = written
    before = {name: value.clone() for name, value in model.state_dict().items()}
    simulation = symmetric(model, X[:2])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        wanted, affine = simulation(X).numpy(), model(X).numpy()
        np.testing.assert_allclose(run(path, X), wanted, atol=1e-5)
    assert 0 < np.abs(wanted - affine).max() < 0.1 * np.abs(affine).max()  # close, and not the same model
    assert broken_rules(path) == []


def test_a_grid_keeps_its_reach_and_a_small_one_its_steps() -> None:
    quantizer = Quantizer()
    quantizer.scale.fill_(0.1)
    quantizer.zero_point.fill_(0)
    twin = SymmetricQuantizer.of(quantizer)
    assert float(twin(torch.tensor(1e3))) == pytest.approx(25.5)  # 255 * 0.1, in 127 steps
    assert float(twin(torch.tensor(-1e3))) == pytest.approx(-25.5 * 128 / 127)
    quantizer.zero_point.fill_(128)
    assert float(SymmetricQuantizer.of(quantizer).scale) == pytest.approx(0.1 * 128 / 127)
    four = Quantizer(4)
    four.scale.fill_(0.1)
    small = SymmetricQuantizer.of(four)
    assert float(small.scale) == pytest.approx(0.1)
    assert float(small(torch.tensor(1e3))) == pytest.approx(1.5)  # 15 steps of 0.1, not 127
    assert float(small(torch.tensor(-1e3))) == 0.0


def _initializer(proto: Any, name: str) -> Any:
    return next(tensor for tensor in proto.graph.initializer if tensor.name == name)


def _store(proto: Any, name: str, value: np.ndarray) -> None:
    _initializer(proto, name).CopyFrom(onnx.numpy_helper.from_array(value, name))


def _first(proto: Any, kind: str, skip: int = 0) -> Any:
    return [node for node in proto.graph.node if node.op_type == kind][skip]


def _opset(proto: Any) -> None:
    proto.opset_import[0].version = 25


def _uint8(proto: Any) -> None:
    _store(proto, _first(proto, "QuantizeLinear").input[2], np.zeros((), np.uint8))


def _shifted(proto: Any) -> None:
    _store(proto, _first(proto, "QuantizeLinear").input[2], np.ones((), np.int8))


def _no_zero_point(proto: Any) -> None:
    del _first(proto, "QuantizeLinear").input[2]


def _negative_scale(proto: Any) -> None:
    _store(proto, _first(proto, "QuantizeLinear").input[1], np.float32(-0.1))


def _one_weight_scale(proto: Any) -> None:
    dequantize = next(node for node in proto.graph.node if "weight" in node.input[0])
    _store(proto, dequantize.input[1], np.full(1, 0.1, np.float32))


def _lowest_weight(proto: Any) -> None:
    name = next(node for node in proto.graph.node if "weight" in node.input[0]).input[0]
    value = onnx.numpy_helper.to_array(_initializer(proto, name)).copy()
    value.flat[0] = -128
    _store(proto, name, value)


def _other_scale(proto: Any) -> None:
    node = next(n for n in proto.graph.node if n.op_type == "DequantizeLinear" and "weight" not in n.input[0])
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(9.0), "nine"))
    node.input[1] = "nine"


def _float_activation(proto: Any) -> None:
    convolution = _first(proto, "Conv")
    dequantize = next(node for node in proto.graph.node if node.output[0] == convolution.input[0])
    quantize = next(node for node in proto.graph.node if node.output[0] == dequantize.input[0])
    convolution.input[0] = quantize.input[0]


def _rounded_before_relu(proto: Any) -> None:
    """conv -> rounded -> relu."""
    convolution, relu = _first(proto, "Conv"), _first(proto, "Relu")
    model = _first(proto, "QuantizeLinear")
    quantize = onnx.helper.make_node("QuantizeLinear", [convolution.output[0], *model.input[1:]], ["early"])
    dequantize = onnx.helper.make_node("DequantizeLinear", ["early", *model.input[1:]], ["late"])
    assert relu.input[0] == convolution.output[0]
    relu.input[0] = "late"
    at = list(proto.graph.node).index(relu)
    proto.graph.node.insert(at, quantize)
    proto.graph.node.insert(at + 1, dequantize)


def _float_shortcut(proto: Any) -> None:
    """relu of the input of a block + convolution: the shortcut is not rounded."""
    _first(proto, "Add").input[1] = _first(proto, "Relu").output[0]


def _float_operator_added(proto: Any) -> None:
    """relu + rounded shortcut."""
    _first(proto, "Add").input[0] = _first(proto, "Relu").output[0]


def _integer_operator(proto: Any) -> None:
    node = onnx.helper.make_node("ConvInteger", list(_first(proto, "Conv").input[:2]), ["whatever"])
    proto.graph.node.append(node)


FAULTS: dict[Callable[[Any], None], str] = {
    _opset: "opset 25",
    _uint8: "not a stored int8 0",
    _shifted: "not a stored int8 0",
    _no_zero_point: "not a stored int8 0",
    _negative_scale: "not a stored positive float32",
    _one_weight_scale: "one scale per output channel",
    _lowest_weight: "within -127..127",
    _other_scale: "another scale",
    _float_activation: "reads rounded weights only",
    _rounded_before_relu: "is rounded in front of Relu",
    _float_shortcut: "what is not rounded, of Relu",
    _float_operator_added: "adds a rounded value and one that is not, of Relu",
    _integer_operator: "is an integer operator",
}


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = Quantize().run(lively(Residual()), TASK)
    return export_tensorrt(model, X[:1], tmp_path_factory.mktemp("rules") / "model.onnx")


@pytest.mark.parametrize("break_it", FAULTS, ids=lambda each: each.__name__)
def test_each_rule_can_be_broken(residual: Path, tmp_path: Path, break_it: Callable[[Any], None]) -> None:
    proto = onnx.load(residual)
    break_it(proto)
    path = tmp_path / "broken.onnx"
    path.write_bytes(proto.SerializeToString())
    found = broken_rules(path)
    assert found, "nothing was found"
    assert any(FAULTS[break_it] in each for each in found), found


def test_the_rule_of_additions_asks_for_one_plain_input(residual: Path, tmp_path: Path) -> None:
    """A convolution that is rounded in front of an addition, whose other input is rounded too."""
    proto = onnx.load(residual)
    add = _first(proto, "Add")
    convolution = next(node for node in proto.graph.node if node.output[0] == add.input[0])
    assert convolution.op_type == "Conv"
    scale = _first(proto, "QuantizeLinear").input[1:]
    at = list(proto.graph.node).index(add)
    proto.graph.node.insert(at, onnx.helper.make_node("DequantizeLinear", ["early", *scale], ["late"]))
    proto.graph.node.insert(at, onnx.helper.make_node("QuantizeLinear", [add.input[0], *scale], ["early"]))
    add.input[0] = "late"
    path = tmp_path / "broken.onnx"
    path.write_bytes(proto.SerializeToString())
    assert any("is rounded in front of Add" in each for each in broken_rules(path))


def test_a_float_model_is_written_as_it_is(tmp_path: Path) -> None:
    model = lively(Residual())
    path = export_tensorrt(model, X[:1], tmp_path / "model.onnx")
    with torch.no_grad():
        np.testing.assert_allclose(run(path, X), model(X).numpy(), rtol=1e-4, atol=1e-4)


def test_what_breaks_a_rule_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersenet.deploy.tensorrt.broken_rules", lambda path: ["a rule"])
    with pytest.raises(ExportError, match="Residual could not be written for TensorRT: a rule"):
        export_tensorrt(lively(Residual()), X[:1], tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
