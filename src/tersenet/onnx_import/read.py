"""Reads an ONNX file, and says in one sentence what cannot become a model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersenet.deploy.runner import Input
from tersenet.errors import FileError, InputWarning, ModelError, require
from tersenet.onnx_import.precision import in_float32

_OLDEST = 9
_QUANTIZED = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QLinearConv",
    "QLinearMatMul", "QLinearAdd", "QLinearMul", "QLinearGlobalAveragePool", "QLinearAveragePool", "QLinearConcat",
    "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "QGemm", "QAttention", "MatMulNBits", "DynamicQuantizeLSTM",
    "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulBnb4", "GatherBlockQuantized",
}  # fmt: skip


@dataclass(frozen=True)
class File:
    """A float ONNX file.

    Args:
        name: its path, for errors.
        proto: the ModelProto in float32, its functions written out, with all weights.
        inputs: by order, without those that have a number in the file; shapes with None for each open size.
        metadata: what it says about itself.
    """

    name: str
    proto: Any
    inputs: tuple[Input, ...]
    metadata: dict[str, str]


def read(path: Path) -> File:
    """Reads a file with its external data.

    Raises:
        FileError: when it cannot be read or is no ONNX file.
        ModelError: when it is quantized, or of an operator set before 9, or takes what is no tensor.
        MissingExtra: when onnx is not installed.
    """
    onnx = require("onnx", "onnx", "read ONNX files")
    proto = _loaded(onnx, path)
    version = next((each.version for each in proto.opset_import if each.domain in ("", "ai.onnx")), None)
    if version is None or not proto.graph.node:
        raise FileError(f"{path} is not an ONNX file with a network in it; check the path")
    if version < _OLDEST:
        raise ModelError(
            f"{path} is of ONNX's operator set {version}; {_OLDEST} and newer are read, so export the model again"
        )
    if proto.functions:
        from onnx.inliner import inline_local_functions

        proto = inline_local_functions(proto)
    _refuse_quantized(path, proto)
    lower = in_float32(proto)
    if lower:
        warnings.warn(f"{path} computes in {lower} and was converted to float32", InputWarning, stacklevel=4)
    metadata = {each.key: each.value for each in proto.metadata_props}
    return File(str(path), proto, tuple(_inputs(path, proto)), metadata)


def _loaded(onnx: Any, path: Path) -> Any:
    try:
        return onnx.load(str(path))
    except FileNotFoundError as error:
        missing = Path(error.filename or path)
        if missing.resolve() == path.resolve():
            raise FileError(f"{path} does not exist; check the path") from error
        raise FileError(f"{path} keeps its weights in {missing}, which does not exist; put it beside it") from error
    except Exception as error:  # protobuf and onnx raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise FileError(f"{path} is not a readable ONNX file: {reason}; write it again") from error


def nodes(graph: Any) -> Iterator[Any]:
    """All nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from nodes(inner)


def _refuse_quantized(path: Path, proto: Any) -> None:
    operators = Counter(node.op_type for node in nodes(proto.graph) if node.op_type in _QUANTIZED)
    if operators:
        listed = ", ".join(f"{count} {name}" for name, count in operators.most_common(3))
        raise ModelError(
            f"{path} is quantized already ({listed}), and what was rounded cannot be compressed well again; give the "
            "float ONNX file that it was made from"
        )


def _inputs(path: Path, proto: Any) -> Iterator[Input]:
    from onnx import helper

    held = {tensor.name for tensor in proto.graph.initializer}
    for value in proto.graph.input:
        if value.name in held:
            continue
        if not value.type.HasField("tensor_type"):
            raise ModelError(f"{path} takes {value.name!r}, which is no tensor; files of tensors are read")
        tensor = value.type.tensor_type
        if not tensor.HasField("shape"):
            raise ModelError(f"{path} does not say the shape of its input {value.name!r}; run shape inference first")
        sizes = tuple(int(dim.dim_value) if dim.dim_value > 0 else None for dim in tensor.shape.dim)
        if not sizes:
            raise ModelError(f"{path} takes a single number as {value.name!r}; inputs with a batch are supported")
        yield Input(value.name, sizes, str(helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
