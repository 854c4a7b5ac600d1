"""Passes over a finished ONNX file: weights made once, at loading, and packed where they have few values."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersenet.deploy.onnx_nodes import OPERATORS_TAKE, ConstantNodes, replace, width

_MOVES = ("Transpose", "Reshape", "Flatten", "MaxPool", "Squeeze", "Unsqueeze", "Slice", "Pad")
_Numbered = tuple[NDArray[Any], NDArray[np.uint8]]


def make_floats_once(onnx: Any, proto: Any) -> None:
    """Int8 weights of operators with float input become float by Cast and Mul instead of DequantizeLinear.

    ONNX Runtime keeps DequantizeLinear of constants for its integer kernels, which need an integer input; without one
    it made the weights anew for every batch, at twice the time of the float network. Cast and Mul it does at loading.
    """
    graph = proto.graph
    made, nodes = ConstantNodes(onnx, graph), []
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in graph.node:
        weight = made.constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if weight is None or len(weight.dims) < 2 or _reads_integers(node.output[0], makers, readers):
            nodes.append(node)
        else:
            nodes += _multiplied(made, node, weight)
    replace(graph, nodes)


def _multiplied(made: ConstantNodes, node: Any, weight: Any) -> list[Any]:
    """The operators that stand for a DequantizeLinear of a constant."""
    made.begin(node.output[0])
    axis = next((each.i for each in node.attribute if each.name == "axis"), 1)
    beside = [-1 if each == axis else 1 for each in range(len(weight.dims))]

    def put(name: str) -> str:
        value = made.onnx.numpy_helper.to_array(made.constants[name]).astype(np.float32)
        return made.own(name, value.reshape(beside) if value.ndim else value)

    found = made.node("Cast", [node.input[0]], to=made.onnx.TensorProto.FLOAT)
    if len(node.input) > 2 and made.onnx.numpy_helper.to_array(made.constants[node.input[2]]).any():
        found = made.node("Sub", [found, put(node.input[2])])
    made.node("Mul", [found, put(node.input[1])], node.output[0])
    return made.made


def _reads_integers(weight: str, makers: dict[str, Any], readers: dict[str, list[Any]]) -> bool:
    """Whether an operator that reads a weight, or that weight moved about, has another input that was dequantized."""
    for reader in readers.get(weight, []):
        if reader.op_type in _MOVES:
            if _reads_integers(reader.output[0], makers, readers):
                return True
            continue
        for name in reader.input[:2]:
            while name != weight and name in makers and makers[name].op_type in _MOVES:
                name = makers[name].input[0]
            if name != weight and name in makers and makers[name].op_type == "DequantizeLinear":
                return True
    return False


def pack_constants(onnx: Any, proto: Any) -> None:
    """Packs weights that have few values, in all or in each row, as numbers of codebooks; the same to the bit.

    Weights are constants of two or more dimensions, float32 or int8.
    """
    graph = proto.graph
    made, nodes = ConstantNodes(onnx, graph), []
    for tensor in list(graph.initializer):
        if len(tensor.dims) < 2 or tensor.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT8):
            continue
        rows = onnx.numpy_helper.to_array(tensor).reshape(tensor.dims[0], -1)
        found = [each for each in (_one_book(rows), _a_book_each(rows)) if each is not None]
        if found:
            book, places = min(found, key=lambda each: _packed_bytes(*each))
            if _packed_bytes(book, places) + OPERATORS_TAKE < rows.nbytes:
                nodes += _looked_up(made, tensor, book, places)
    replace(graph, nodes + list(graph.node))


def _looked_up(made: ConstantNodes, tensor: Any, book: NDArray[Any], places: NDArray[np.uint8]) -> list[Any]:
    """The operators that make a constant of the numbers of its values; they take over its name."""
    made.begin(tensor.name)
    made.graph.initializer.remove(tensor)
    values, numbers = made.own("book", book), made.numbers(places, width(book.shape[-1]))
    made.found(values, book.shape, numbers, list(tensor.dims), tensor.name)
    return made.made


def _one_book(rows: NDArray[Any]) -> _Numbered | None:
    """(values), (R, C) their numbers; None for more than 256 values."""
    few = _bits(rows).reshape(-1)[:: max(1, rows.size // 1024)]
    if len(np.unique(few)) > 256:  # as weights that nothing was done to: their millions need no sorting
        return None
    book, places = np.unique(_bits(rows), return_inverse=True)
    return None if len(book) > 256 else (book.view(rows.dtype), places.reshape(rows.shape).astype(np.uint8))


def _a_book_each(rows: NDArray[Any]) -> _Numbered | None:
    """(R, most values of a row), (R, C) their numbers; None for more than 256 values, or than half of the row."""
    each = []
    for row in _bits(rows):
        each.append(np.unique(row, return_inverse=True))
        if len(each[-1][0]) > min(256, rows.shape[1] // 2):
            return None
    most = max(len(book) for book, _ in each)
    books = np.stack([np.pad(book, (0, most - len(book))) for book, _ in each])
    return books.view(rows.dtype), np.stack([places for _, places in each]).astype(np.uint8)


def _bits(rows: NDArray[Any]) -> NDArray[Any]:
    """Floats as integers of the same bits, so that 0 and -0 are two values."""
    return rows.view(np.int32) if rows.dtype == np.float32 else rows


def _packed_bytes(book: NDArray[Any], places: NDArray[np.uint8]) -> int:
    return book.nbytes + places.size * width(book.shape[-1]) // 8
