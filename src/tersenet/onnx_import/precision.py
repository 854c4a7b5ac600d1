"""Files of half precision become files of float32: runtimes on CPUs compute so, and every method here does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


def in_float32(proto: Any) -> str:
    """Changes a ModelProto of float16 or bfloat16 to float32.

    Returns:
        what it computed in; "" where nothing was changed.
    """
    from onnx import TensorProto

    lower = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
    types: set[str] = set()
    for graph in _graphs(proto.graph):
        for tensor in graph.initializer:
            types |= _convert(tensor, lower)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in lower:
                types.add(lower[value.type.tensor_type.elem_type])
                value.type.tensor_type.elem_type = TensorProto.FLOAT
    if not types:
        return ""
    for graph in _graphs(proto.graph):
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    _convert(attribute.t, lower)
                if node.op_type in ("Cast", "EyeLike") and attribute.name in ("to", "dtype") and attribute.i in lower:
                    attribute.i = TensorProto.FLOAT
    return " and ".join(sorted(types))


def _convert(tensor: Any, lower: dict[int, str]) -> set[str]:
    from onnx import numpy_helper

    if tensor.data_type not in lower:
        return set()
    types = {lower[tensor.data_type]}
    name, array = tensor.name, numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(array).astype(np.float32), name))
    return types


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)
