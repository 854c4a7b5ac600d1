"""ONNX files become models: layers under their names, an open batch, the outputs of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_files import Attention, Residual, exported, normal, unoptimized, written
from torch import nn

from tersenet.deploy.onnx import export_onnx
from tersenet.errors import FileError, InputWarning, ModelError
from tersenet.graph.trace import fixed_batch, trace
from tersenet.onnx_import import open_onnx
from tersenet.onnx_import.activations import relu
from tersenet.onnx_import.network import Network
from tersenet.onnx_import.registry import HANDLERS
from tersenet.sources import open_model
from tersenet.task import Preparation

helper = pytest.importorskip("onnx.helper")
ort = pytest.importorskip("onnxruntime")
HOWS = ("dynamo", "torchscript", "dynamo-fixed", "torchscript-fixed")


def runtime(path: Path, *inputs: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {each.name: x for each, x in zip(session.get_inputs(), inputs, strict=True)})  # type: ignore[no-any-return]


def outputs(model: nn.Module, *inputs: np.ndarray) -> list[np.ndarray]:
    with torch.no_grad():
        found = model(*map(torch.from_numpy, inputs))
    return [each.numpy() for each in (found.values() if isinstance(found, dict) else [found])]


@pytest.mark.minutes
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", [Residual, Attention])
def test_exports_of_torch(kind: type[nn.Module], how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind()
    x = torch.randn(3, 3, 8, 8)
    opened, preparation = open_onnx(exported(model, x, tmp_path / "model.onnx", how))
    with torch.no_grad():
        torch.testing.assert_close(opened(x), model(x), rtol=1e-4, atol=1e-5)
    assert preparation is not None
    assert preparation.size == (8, 8)
    assert not opened.training
    again = trace(opened, x[:2])
    assert fixed_batch(again) is None


@pytest.mark.parametrize("how", HOWS)
def test_layers_have_the_names_of_the_network(how: str, tmp_path: Path) -> None:
    path = exported(Residual(), torch.randn(2, 3, 8, 8), tmp_path / "model.onnx", how)
    opened, _ = open_onnx(path)
    layers = {
        name: type(each).__name__ for name, each in opened.named_modules() if list(each.parameters(recurse=False))
    }
    assert {"stem.0": "Conv2d", "conv": "Conv2d", "head": "Linear"}.items() <= layers.items()


def test_an_export_without_optimizations_keeps_its_batch_norms(tmp_path: Path) -> None:
    """Its convolution without a bias has one of zeros, which is computed from the type of the input."""
    opened, _ = open_onnx(unoptimized(Residual(), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx"))
    layers = {
        name: type(each).__name__ for name, each in opened.named_modules() if list(each.parameters(recurse=False))
    }
    assert layers == {"stem.0": "Conv2d", "stem.1": "BatchNorm2d", "conv": "Conv2d", "head": "Linear"}


@pytest.mark.parametrize("version", [11, 14])
def test_what_older_operator_sets_write_as_arithmetic_is_known(version: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 3, 8, 8)
    torch.nn.init.uniform_(model.norm.weight)
    opened, _ = open_onnx(exported(model, x, tmp_path / "model.onnx", "torchscript", version))
    assert sum(isinstance(each, nn.LayerNorm) for each in opened.modules()) == 1
    assert sum("gelu" in str(node.target) for node in opened.graph.nodes) == 1  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(opened(x), model(x), rtol=1e-4, atol=1e-5)


def test_equal_numbers_are_no_shared_layer_and_shared_layers_stay_shared(tmp_path: Path) -> None:
    """Exporters keep one of equal numbers: here the ones and zeros of two batch norms before a training."""
    norm = ["norm.weight", "norm.bias", "norm.bias", "norm.weight"]
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["a", *norm], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Conv", ["c", "conv.weight"], ["d"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["d", *norm], ["y"]),
    ]
    ones, zeros = np.ones(3, np.float32), np.zeros(3, np.float32)
    constants = {"conv.weight": normal(3, 3, 3, 3), "norm.weight": ones, "norm.bias": zeros}
    opened, _ = open_onnx(written(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, ["y"], constants))
    kinds = [type(each).__name__ for each in opened.modules()]
    assert (kinds.count("BatchNorm2d"), kinds.count("Conv2d")) == (2, 1)
    targets = [str(node.target) for node in opened.graph.nodes if node.op == "call_module"]  # type: ignore[union-attr]
    assert [target for target in targets if "conv" in target] == ["conv", "conv"]


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_paddings_of_convolutions_and_pools(auto: str, stride: int, dilation: int, tmp_path: Path) -> None:
    if auto.startswith("SAME") and dilation > 1:
        pytest.skip("ONNX Runtime has no dilation with these")
    pads = {"pads": [0, 1, 1, 2]} if auto == "NOTSET" else {"auto_pad": auto}
    size = [stride, stride]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], strides=size, dilations=[dilation] * 2, **pads),
        helper.make_node("MaxPool", ["a"], ["b"], kernel_shape=[3, 3], strides=size, **pads),
        helper.make_node("AveragePool", ["a"], ["c"], kernel_shape=[3, 3], strides=size, **pads),
        helper.make_node("AveragePool", ["a"], ["d"], kernel_shape=[3, 3], strides=size, count_include_pad=1, **pads),
    ]
    names = ["b", "c", "d"]
    path = written(tmp_path / "m.onnx", nodes, {"x": ["N", 2, 33, 34]}, names, {"w": normal(4, 2, 3, 3)})
    opened, _ = open_onnx(path)
    x = normal(2, 2, 33, 34, seed=1)
    for own, wanted in zip(outputs(opened, x), runtime(path, x), strict=True):
        np.testing.assert_allclose(own, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "stride", "pads"),
    [(2, 2, [0, 0, 0, 0]), (3, 2, [1, 1, 1, 1]), (3, 2, [0, 1, 1, 0]), (3, 3, [0, 0, 2, 1])],
)
def test_pools_that_reach_beyond_the_end(kernel: int, stride: int, pads: list[int], tmp_path: Path) -> None:
    settings = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": pads, "ceil_mode": 1}
    nodes = [
        helper.make_node("MaxPool", ["x"], ["a"], **settings),
        helper.make_node("AveragePool", ["x"], ["b"], **settings),
    ]
    path = written(tmp_path / "m.onnx", nodes, {"x": ["N", 2, 9, 12]}, ["a", "b"], version=22)
    opened, _ = open_onnx(path)
    x = normal(2, 2, 9, 12)
    for own, wanted in zip(outputs(opened, x), runtime(path, x), strict=True):
        np.testing.assert_allclose(own, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"strides": [2, 2]}, {"strides": [2, 2], "pads": [0, 1, 1, 0]},
                                      {"strides": [2, 2], "output_shape": [15, 16]},
                                      {"strides": [2, 2], "auto_pad": "SAME_LOWER"},
                                      {"strides": [3, 3], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}])  # fmt: skip
def test_transposed_convolutions(settings: dict[str, Any], tmp_path: Path) -> None:
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], **settings)
    path = written(tmp_path / "m.onnx", [node], {"x": ["N", 3, 8, 8]}, ["y"], {"w": normal(3, 4, 3, 3), "b": normal(4)})
    opened, _ = open_onnx(path)
    x = normal(2, 3, 8, 8)
    np.testing.assert_allclose(outputs(opened, x)[0], runtime(path, x)[0], rtol=1e-4, atol=1e-5)
    assert any(isinstance(each, nn.ConvTranspose2d) for each in opened.modules())


def test_a_fixed_batch_among_the_numbers_is_opened(tmp_path: Path) -> None:
    """Tokens, then windows whose number is the batch times 4, then back."""
    shapes = {"s1": [1, 2, 4, 2, 4, 3], "s2": [4, 16, 3], "s3": [1, 2, 2, 4, 4, 3], "s4": [1, 64, 3]}
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", ["t", "s1"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 1, 3, 2, 4, 5]),
        helper.make_node("Reshape", ["b", "s2"], ["c"]),
        helper.make_node("Softmax", ["c"], ["d"], axis=1),
        helper.make_node("Reshape", ["d", "s3"], ["e"]),
        helper.make_node("Reshape", ["e", "s4"], ["f"]),
        helper.make_node("Concat", ["token", "f"], ["y"], axis=1),
    ]
    constants: dict[str, np.ndarray] = {name: np.array(shape) for name, shape in shapes.items()}
    path = written(tmp_path / "m.onnx", nodes, {"x": [1, 3, 8, 8]}, ["y"], {**constants, "token": normal(1, 1, 3)})
    opened, _ = open_onnx(path)
    x = normal(5, 3, 8, 8)
    wanted = np.concatenate([runtime(path, x[i : i + 1])[0] for i in range(5)])
    np.testing.assert_allclose(outputs(opened, x)[0], wanted, rtol=1e-4, atol=1e-6)


def test_an_open_batch_that_only_takes_one_sample_is_opened(tmp_path: Path) -> None:
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    path = written(tmp_path / "m.onnx", [node], {"x": ["N", 3, 4, 4]}, ["y"], {"shape": np.array([1, 48])})
    opened, _ = open_onnx(path)
    assert outputs(opened, normal(3, 3, 4, 4))[0].shape == (3, 48)


def test_a_file_that_mixes_its_samples_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("ReduceMean", ["x"], ["m"], axes=[0]), helper.make_node("Sub", ["x", "m"], ["y"])]
    path = written(tmp_path / "m.onnx", nodes, {"x": [1, 3, 4, 4]}, ["y"])
    with pytest.raises(ModelError, match="for a batch of 2 its output 'y' differs"):
        open_onnx(path)


def test_images_of_any_size_need_a_size(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], strides=[2, 2], auto_pad="SAME_UPPER"),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Slice", ["shape", "two", "four"], ["hw"]),
        helper.make_node("Shape", ["a"], ["own"]),
        helper.make_node("Slice", ["own", "zero", "two"], ["nc"]),
        helper.make_node("Concat", ["nc", "hw"], ["size"], axis=0),
        helper.make_node("Resize", ["a", "", "", "size"], ["y"], mode="nearest", nearest_mode="floor",
                         coordinate_transformation_mode="asymmetric"),
    ]  # fmt: skip
    constants = {"w": normal(4, 3, 3, 3)} | {name: np.array([i]) for i, name in ((0, "zero"), (2, "two"), (4, "four"))}
    path = written(tmp_path / "m.onnx", nodes, {"x": ["N", 3, "H", "W"]}, ["y"], constants)
    with pytest.raises(ModelError, match="any size; say which with --image-size"):
        open_onnx(path)
    opened, preparation = open_onnx(path, (9, 12))
    assert preparation is not None
    assert preparation.size == (9, 12)
    x = normal(2, 3, 9, 12)
    np.testing.assert_allclose(outputs(opened, x)[0], runtime(path, x)[0], rtol=1e-4, atol=1e-5)


def test_a_fixed_size_takes_no_other(tmp_path: Path) -> None:
    path = written(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], {"x": ["N", 3, 8, 8]}, ["y"])
    with pytest.raises(ModelError, match="images of 8x8 alone, and --image-size is 9x9"):
        open_onnx(path, (9, 9))


@pytest.mark.parametrize("operator", ["QuantizeLinear", "DynamicQuantizeLinear", "ConvInteger"])
def test_quantized_files_are_said(operator: str, tmp_path: Path) -> None:
    node = helper.make_node(operator, ["x", "s"], ["y"])
    path = written(tmp_path / "m.onnx", [node], {"x": ["N", 3, 8, 8]}, ["y"], {"s": np.float32(1)[None]})
    with pytest.raises(ModelError, match=f"quantized already \\(1 {operator}\\).*give the float ONNX file"):
        open_onnx(path)


def test_an_operator_that_is_not_known_is_named_with_its_node_and_file(tmp_path: Path) -> None:
    node = helper.make_node("Det", ["x"], ["y"], name="the_node")
    path = written(tmp_path / "m.onnx", [node], {"x": ["N", 3, 8, 8]}, ["y"])
    with pytest.raises(ModelError, match=r"m\.onnx cannot be imported: operator Det \(node 'the_node'\) is not known"):
        open_onnx(path)
    node = helper.make_node("FusedConv", ["x"], ["y"], name="fused", domain="com.microsoft")
    path = written(tmp_path / "f.onnx", [node], {"x": ["N", 3, 8, 8]}, ["y"])
    with pytest.raises(ModelError, match=r"operator FusedConv of com\.microsoft .*without the optimizations"):
        open_onnx(path)


def test_an_attribute_that_no_handler_reads_is_named(tmp_path: Path) -> None:
    from onnx import load

    node = helper.make_node("LeakyRelu", ["x"], ["y"], name="new", slope=2.0, alpha=0.1)
    path = written(tmp_path / "m.onnx", [node], {"x": ["N", 3]}, ["y"])
    with pytest.raises(
        ModelError, match=r"operator LeakyRelu \(node 'new'\) has the attribute slope=2.0, which is not known"
    ):
        Network(load(str(path)), "m.onnx").run([torch.ones(2, 3)])


def test_a_setting_that_torch_does_not_have_is_named(tmp_path: Path) -> None:
    node = helper.make_node("Resize", ["x", "", "s"], ["y"], mode="linear", antialias=1, name="small")
    path = written(
        tmp_path / "m.onnx", [node], {"x": ["N", 3, 8, 8]}, ["y"], {"s": np.array([1, 1, 0.5, 0.5], np.float32)}, 18
    )
    with pytest.raises(ModelError, match=r"operator Resize \(node 'small'\) has antialias=1"):
        open_onnx(path)


def test_a_wrong_import_is_found_and_its_node_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported(Residual(), torch.randn(2, 3, 8, 8), tmp_path / "model.onnx", "dynamo")
    monkeypatch.setitem(HANDLERS, "Relu", lambda call: relu(call) * 1.01)
    with pytest.raises(ModelError, match=r"differs by .* the first that differs is operator Relu \(node "):
        open_onnx(path)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"]), helper.make_node("Cast", ["a"], ["b"], to=1),
             helper.make_node("Exp", ["b"], ["c"]), helper.make_node("Cast", ["c"], ["y"], to=10)]  # fmt: skip
    weight = normal(4, 3, 3, 3).astype(np.float16)
    path = written(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, ["y"], {"w": weight}, dtype=10)
    with pytest.warns(InputWarning, match="computes in float16 and was converted to float32"):
        opened, _ = open_onnx(path)
    x = normal(2, 3, 8, 8)
    (own,) = outputs(opened, x)
    assert own.dtype == np.float32
    np.testing.assert_allclose(own, runtime(path, x.astype(np.float16))[0], rtol=5e-2, atol=5e-2)


def test_weights_beside_the_file(tmp_path: Path) -> None:
    from onnx import load, save

    path = exported(Residual(), torch.randn(2, 3, 8, 8), tmp_path / "model.onnx", "dynamo")
    whole = load(str(path))
    beside = tmp_path / "apart" / "model.onnx"
    beside.parent.mkdir()
    save(whole, str(beside), save_as_external_data=True, location="weights.bin", size_threshold=64)
    x = normal(2, 3, 8, 8)
    np.testing.assert_allclose(outputs(open_onnx(beside)[0], x)[0], runtime(beside, x)[0], rtol=1e-4, atol=1e-5)
    (beside.parent / "weights.bin").unlink()
    with pytest.raises(FileError, match=r"weights\.bin"):
        open_onnx(beside)


def test_weights_among_the_inputs(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["x", "conv.weight"], ["y"])
    inputs = {"x": ["N", 3, 8, 8], "conv.weight": [4, 3, 3, 3]}
    path = written(tmp_path / "m.onnx", [node], inputs, ["y"], {"conv.weight": normal(4, 3, 3, 3)}, version=9)
    opened, _ = open_onnx(path)
    assert [name for name, _ in opened.named_parameters()] == ["conv.weight"]
    assert [each.name for each in opened.inputs] == ["x"]  # type: ignore[union-attr]


def test_several_inputs_and_outputs_keep_their_names(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["left", "w"], ["a"]),
        helper.make_node("Add", ["a", "bias"], ["logits"]),
        helper.make_node("Mul", ["right", "logits"], ["scaled"]),
    ]
    constants = {"w": normal(6, 5), "bias": normal(5)}
    path = written(tmp_path / "m.onnx", nodes, {"left": ["N", 6], "right": ["N", 5]}, ["logits", "scaled"], constants)
    opened, preparation = open_onnx(path)
    assert preparation is None
    assert [str(each.name) for each in opened.inputs] == ["left", "right"]  # type: ignore[union-attr]
    places = [node.target for node in opened.graph.nodes if node.op == "placeholder"]  # type: ignore[union-attr]
    assert places == ["left", "right"]
    left, right = normal(3, 6), normal(3, 5, seed=1)
    with torch.no_grad():
        assert list(opened(torch.from_numpy(left), torch.from_numpy(right))) == ["logits", "scaled"]
    for own, wanted in zip(outputs(opened, left, right), runtime(path, left, right), strict=True):
        np.testing.assert_allclose(own, wanted, rtol=1e-4, atol=1e-6)
    (layer,) = (each for each in opened.modules() if isinstance(each, nn.Linear))
    assert layer.bias is not None


def branches(condition: str) -> Any:
    from onnx import TensorProto

    def branch(name: str, operator: str) -> Any:
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(operator, ["x"], [name])], name, [], [value])

    return helper.make_node("If", [condition], ["y"], then_branch=branch("t", "Relu"), else_branch=branch("e", "Neg"))


def test_a_condition_of_constants_or_sizes_takes_its_branch(tmp_path: Path) -> None:
    x = normal(2, 3, 8, 8)
    path = written(
        tmp_path / "c.onnx", [branches("no")], {"x": ["N", 3, 8, 8]}, ["y"], {"no": np.array(False)}, version=17
    )
    np.testing.assert_array_equal(outputs(open_onnx(path)[0], x)[0], -x)
    nodes = [helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Gather", ["s", "two"], ["h"]),
             helper.make_node("Equal", ["h", "eight"], ["c"]), branches("c")]  # fmt: skip
    path = written(tmp_path / "s.onnx", nodes, {"x": ["N", 3, 8, 8]}, ["y"], {"two": np.array(2), "eight": np.array(8)})
    np.testing.assert_array_equal(outputs(open_onnx(path)[0], x)[0], np.maximum(x, 0))


def test_a_condition_of_values_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0), helper.make_node("Greater", ["m", "one"], ["c"]),
             branches("c")]  # fmt: skip
    path = written(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, ["y"], {"one": np.float32(1)})
    with pytest.raises(ModelError, match=r"operator If .* computes its condition from the values of a tensor"):
        open_onnx(path)


def test_images_with_channels_last_are_taken_as_all_others(tmp_path: Path) -> None:
    nodes = [helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
             helper.make_node("Conv", ["t", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])]  # fmt: skip
    path = written(tmp_path / "m.onnx", nodes, {"x": ["N", 9, 8, 3]}, ["y"], {"w": normal(4, 3, 3, 3)})
    with pytest.warns(InputWarning, match=r"takes images \(N, H, W, C\)"):
        opened, preparation = open_onnx(path)
    assert preparation is not None
    assert preparation.size == (9, 8)
    x = normal(2, 3, 9, 8)
    wanted = runtime(path, np.ascontiguousarray(x.transpose(0, 2, 3, 1)))[0]
    np.testing.assert_allclose(outputs(opened, x)[0], wanted, rtol=1e-4, atol=1e-5)
    assert not any("permute" in str(node.target) for node in opened.graph.nodes)  # type: ignore[union-attr]


@pytest.mark.parametrize("version", [9, 11, 13, 17, 20, 22, 24])
def test_operator_sets(version: int, tmp_path: Path) -> None:
    axes: dict[str, Any] = {"axes": [2, 3]} if version < 18 else {}
    names = ["x"] if version < 18 else ["x", "axes"]
    nodes = [
        helper.make_node("ReduceMean", names, ["m"], keepdims=0, **axes),
        helper.make_node("Softmax", ["x"], ["s"]),
        helper.make_node("Clip", ["s"], ["c"], min=0.0, max=0.01) if version < 11
        else helper.make_node("Clip", ["s", "low", "high"], ["c"]),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("Concat", ["m", "f"], ["y"], axis=1),
    ]  # fmt: skip
    constants = {} if version < 11 else {"low": np.float32(0), "high": np.float32(0.01)}
    constants |= {} if version < 18 else {"axes": np.array([2, 3])}
    path = written(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 4, 5]}, ["y"], constants, version)
    opened, _ = open_onnx(path)
    x = normal(2, 3, 4, 5)
    np.testing.assert_allclose(outputs(opened, x)[0], runtime(path, x)[0], rtol=1e-4, atol=1e-6)


def test_an_older_operator_set_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], {"x": ["N", 3]}, ["y"], version=8)
    with pytest.raises(ModelError, match="operator set 8; 9 and newer are read"):
        open_onnx(path)


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"):
        open_onnx(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no network", encoding="utf-8")
    with pytest.raises(FileError, match=r"text\.onnx is not"):
        open_onnx(tmp_path / "text.onnx")


def test_a_file_of_ours_says_how_images_are_prepared(tmp_path: Path) -> None:
    preparation = Preparation((8, 8), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), ("a", "b", "c", "d"))
    path = export_onnx(Residual().eval(), torch.randn(2, 3, 8, 8), tmp_path / "ours.onnx", preparation)
    _, found = open_model(str(path))
    assert found == preparation
    assert found.assumed == ()
    foreign = exported(Residual(), torch.randn(2, 3, 8, 8), tmp_path / "foreign.onnx", "torchscript")
    _, found = open_model(str(foreign))
    assert found.size == (8, 8)
    assert found.assumed == ("mean", "std")


def test_a_file_of_no_images_is_said_where_images_are_needed(tmp_path: Path) -> None:
    path = written(tmp_path / "m.onnx", [helper.make_node("Relu", ["tokens"], ["y"])], {"tokens": ["N", 5]}, ["y"])
    with pytest.raises(ModelError, match=r"takes tokens of Nx5; models of one input, images"):
        open_model(str(path))
    with pytest.raises(ModelError, match="holds its own weights; leave --weights out"):
        open_model(str(path), tmp_path / "w.safetensors")
