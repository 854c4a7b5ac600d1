"""Weights of few bits in ONNX files: packed codes, and the standard operators that make weights of them.

Codes are cut into digits of 8, 4, 2 and 1 bits (3 bits are 2 + 1), the digits of one width are packed into bytes; a
byte is looked up in a table of its digits (Gather), the digits are put together, and become a weight by a scale or a
codebook. All of it hangs on constants alone, so runtimes work it out once, when they load the file. ONNX has no type
for most of these formats, and of those that it has, few runtimes read all.

The exporter sees one operator of our own for each weight; `unpack_weights` puts the real ones in its place.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.bricks.coded import StoredLayer
from tersenet.bricks.codes import BasesCode, Code, FloatCode, GridCode, PieceCode, TableCode, TernaryCode
from tersenet.bricks.quantized import Int8Layer
from tersenet.errors import ExportError
from tersenet.numerics.float_formats import FLOATS

_DOMAIN, _OPERATOR = "tersenet", "Weight"
_WIDTHS = (8, 4, 2, 1)
# Bytes of the operators that take a weight's codes apart, about.
_OPERATORS_TAKE = 600


class StoredAsOnnx(nn.Module):
    """A stored layer whose weight comes from one operator of our own, which `unpack_weights` replaces."""

    codes: Tensor

    def __init__(self, layer: StoredLayer) -> None:
        super().__init__()
        self.layer, code = layer, layer.code
        self.shape = list(code.shape)
        self.kind, self.bits, shared = _parts(code)
        lowest = code.grid.low if isinstance(code, GridCode) else 0
        codes = layer.codes if self.kind == "cast" else (layer.codes.to(torch.int16) - lowest).to(torch.uint8)
        self.register_buffer("codes", codes)
        self.names = [f"shared_{number}" for number in range(len(shared))]
        for name, value in zip(self.names, shared, strict=True):
            self.register_buffer(name, value.detach().contiguous())

    def weight(self) -> Tensor:
        inputs = (self.codes, *(getattr(self, name) for name in self.names))
        return _operator(inputs, self.kind, self.bits, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        if isinstance(layer, nn.Conv2d):
            return layer._conv_forward(x, self.weight(), layer.bias)
        return F.linear(x, self.weight(), layer.bias)


class Int8AsOnnx(nn.Module):
    """A settled layer of float input, its weight (integer - zero point) * scale by the same operator.

    Not by DequantizeLinear: ONNX Runtime keeps that for integer kernels, which need an integer input, and without one
    works it out anew for every batch, at twice the time of a float network.
    """

    codes: Tensor
    zeros: Tensor
    scale: Tensor

    def __init__(self, layer: Int8Layer) -> None:
        super().__init__()
        self.layer, self.shape = layer, list(layer.weight.shape)
        low, high = (int(end) for end in torch.aminmax(layer.weight))
        self.bits = _width(high - low + 1)
        self.register_buffer("codes", (layer.weight.to(torch.int16) - low).to(torch.uint8))
        self.register_buffer("zeros", torch.full((1,), float(-low)))
        self.register_buffer("scale", layer.weight_scale.reshape(-1, *(1,) * (layer.weight.dim() - 1)).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        weight = _operator((self.codes, self.zeros, self.scale), "grid", self.bits, self.shape)
        if isinstance(layer, nn.Conv2d):
            return layer._conv_forward(x, weight, layer.bias)
        return F.linear(x, weight, layer.bias)


def _operator(inputs: tuple[Tensor, ...], kind: str, bits: int, shape: list[int]) -> Tensor:
    attributes: dict[str, Any] = {"kind": kind, "bits": bits, "shape": shape}
    name = f"{_DOMAIN}::{_OPERATOR}"
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=torch.float32, shape=shape, version=1)


def _parts(code: Any) -> tuple[str, int, list[Tensor]]:
    """What makes weights of a code's numbers: (how, bits of a number, what is shared).

    cast: the numbers are floats. grid: (number - zero point) * scale. book:
    the entry of a list, of single weights or of pieces. rows: the entry of a list that each output has. scaled: the
    entry of a list, times a scale.
    """
    if isinstance(code, GridCode):
        zeros = code.grid.spread(code.zeros - code.grid.low, code.shape)  # the number that stands for 0
        return "grid", code.bits, [zeros, code.grid.spread(code.scale, code.shape)]
    if isinstance(code, TernaryCode):
        return "grid", 2, [torch.ones(1), _beside(code.scale, code)]
    if isinstance(code, BasesCode) and code.count == 1:  # (number - 1/2) * 2 a
        return "grid", 1, [torch.full((1,), 0.5), _beside(2 * code.scales[0].abs(), code)]
    if isinstance(code, FloatCode):
        if code.scale is None:
            return "cast", 16, []
        values = torch.arange(256, dtype=torch.uint8).view(FLOATS[code.format]).float()
        beside = _beside(code.scale, code)
        # NaN and infinities are among the 256; no weight is one.
        return "scaled", 8, [torch.nan_to_num(values, 0.0, 0.0, 0.0).to(beside.device), beside]
    if isinstance(code, PieceCode):
        if len(code.codebooks) != 1:
            raise ExportError("an ONNX file holds one codebook of pieces for a layer; quantize with shared codebooks")
        book = code.codebooks[0]
        return "book", _width(len(book)), [book]
    assert isinstance(code, TableCode)
    table = code.table()
    return ("book" if len(table) == 1 else "rows"), _width(table.shape[1]), [table[0] if len(table) == 1 else table]


def _beside(scale: Tensor, code: Code) -> Tensor:
    """(O,) -> (O, 1, ...), to stand beside a weight."""
    return scale.reshape(-1, *(1,) * (len(code.shape) - 1))


def _width(count: int) -> int:
    """Bits that tell `count` values apart."""
    return max(1, (count - 1).bit_length())


def unpack_weights(onnx: Any, proto: Any) -> None:
    """Packs the codes of a file's `StoredAsOnnx` layers, and puts operators of ONNX in place of ours."""
    graph = proto.graph
    if not any(node.domain == _DOMAIN for node in graph.node):
        return
    made = _Unpacker(onnx, graph)
    nodes = [new for node in graph.node for new in (made.nodes_for(node) if node.domain == _DOMAIN else [node])]
    _replace(graph, nodes)
    for entry in [entry for entry in proto.opset_import if entry.domain == _DOMAIN]:
        proto.opset_import.remove(entry)


def pack_constants(onnx: Any, proto: Any) -> None:
    """Packs weights that have few values, in all or in each row, as numbers of codebooks; the same to the bit.

    Weights are constants of two or more dimensions: float32, and the int8 that DequantizeLinear reads.
    """
    graph = proto.graph
    integers = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    made, nodes = _Unpacker(onnx, graph), []
    for tensor in list(graph.initializer):
        quantized = tensor.data_type == onnx.TensorProto.INT8 and tensor.name in integers
        if len(tensor.dims) < 2 or not (quantized or tensor.data_type == onnx.TensorProto.FLOAT):
            continue
        rows = onnx.numpy_helper.to_array(tensor).reshape(tensor.dims[0], -1)
        found = [each for each in (_one_book(rows), _a_book_each(rows)) if each is not None]
        if found:
            book, places = min(found, key=lambda each: _packed_bytes(*each))
            if _packed_bytes(book, places) + _OPERATORS_TAKE < rows.nbytes:
                nodes += made.looked_up(tensor, book, places)
    _replace(graph, nodes + list(graph.node))


_Numbered = tuple[NDArray[Any], NDArray[np.uint8]]


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
    return book.nbytes + places.size * _width(book.shape[-1]) // 8


def _replace(graph: Any, nodes: list[Any]) -> None:
    """Other operators, and only the constants that they read."""
    kept = [copy.deepcopy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


class _Unpacker:
    """The operators that stand for one of ours."""

    def __init__(self, onnx: Any, graph: Any) -> None:
        self.onnx, self.graph = onnx, graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.made: list[Any] = []
        self.name = ""

    def nodes_for(self, node: Any) -> list[Any]:
        self.made, self.name = [], node.output[0]
        settings = {each.name: self.onnx.helper.get_attribute_value(each) for each in node.attribute}
        kind, bits = settings["kind"].decode(), int(settings["bits"])
        shape = [int(size) for size in settings["shape"]]
        codes, shared, out = node.input[0], node.input[1:], node.output[0]
        if kind == "cast":
            self._node("Cast", [codes], out, to=self.onnx.TensorProto.FLOAT)
            return self.made
        numbers = self.onnx.numpy_helper.to_array(self.constants[codes])
        if kind == "grid":
            places = self._reshaped(self._numbers(numbers, bits), shape)
            whole = self._node("Cast", [places], to=self.onnx.TensorProto.FLOAT)
            self._node("Mul", [self._node("Sub", [whole, shared[0]]), shared[1]], out)
        elif kind == "scaled":
            places = self._reshaped(self._numbers(numbers, bits), shape)
            self._node("Mul", [self._node("Gather", [shared[0], places], axis=0), shared[1]], out)
        else:
            book = self.constants[shared[0]].dims
            self._found(shared[0], book if kind == "rows" else book[:1], self._numbers(numbers, bits), shape, out)
        return self.made

    def looked_up(self, tensor: Any, book: NDArray[Any], places: NDArray[np.uint8]) -> list[Any]:
        """The operators that make a constant of the numbers of its values; they take over its name."""
        self.made, self.name = [], tensor.name
        self.graph.initializer.remove(tensor)
        values, numbers = self._own("book", book), self._numbers(places, _width(book.shape[-1]))
        self._found(values, book.shape, numbers, list(tensor.dims), tensor.name)
        return self.made

    def _found(self, book: str, size: Sequence[int], numbers: str, shape: list[int], out: str) -> None:
        """The entries of a codebook by their numbers; one of two dimensions holds a row for each output.

        Not by GatherElements, which OpenVINO does not work out at loading.
        """
        if len(size) == 2:
            begins = self._shared(
                f"rows_{size[0]}_{size[1]}", np.arange(size[0], dtype=np.int32)[:, None] * np.int32(size[1])
            )
            numbers = self._node("Add", [self._reshaped(numbers, [size[0], -1]), begins])
            book = self._reshaped(book, [-1])
        self._reshaped(self._node("Gather", [book, numbers], axis=0), shape, out)

    def _numbers(self, numbers: NDArray[np.uint8], bits: int) -> str:
        """(n,) int32: packed numbers, taken apart again."""
        flat, low, parts = numbers.reshape(-1), 0, []
        for width in _WIDTHS:
            if bits & width:
                digits = (flat >> low) & (2**width - 1)
                parts.append((self._digits(digits.astype(np.uint8), width), low))
                low += width
        total = ""
        for digits, shift in parts:
            if shift:
                digits = self._node("Mul", [digits, self._shared(f"times_{2**shift}", np.array(2**shift, np.int32))])
            total = self._node("Add", [total, digits]) if total else digits
        return total

    def _digits(self, digits: NDArray[np.uint8], width: int) -> str:
        """(n,) int32 digits of some bits, from bytes that hold 8 / width of them, the first one lowest."""
        each = 8 // width
        padded = np.pad(digits, (0, -len(digits) % each)).reshape(-1, each)
        packed = (padded << (width * np.arange(each, dtype=np.uint8))).sum(axis=1).astype(np.uint8)
        taken = self._node("Cast", [self._own(f"packed_{width}", packed)], to=self.onnx.TensorProto.INT32)
        if each == 1:
            return taken
        held = (np.arange(256)[:, None] >> (width * np.arange(each))) & (2**width - 1)
        table = self._shared(f"digits_{width}", held.astype(np.uint8))
        found = self._node("Cast", [self._node("Gather", [table, taken], axis=0)], to=self.onnx.TensorProto.INT32)
        flat = self._reshaped(found, [-1])
        if padded.size == len(digits):
            return flat
        ends = [self._shared(f"at_{value}", np.array([value], np.int64)) for value in (0, len(digits))]
        return self._node("Slice", [flat, *ends])

    def _reshaped(self, value: str, shape: list[int], out: str = "") -> str:
        name = "shape_" + "_".join(map(str, shape)).replace("-1", "flat")
        return self._node("Reshape", [value, self._shared(name, np.array(shape, np.int64))], out)

    def _node(self, operator: str, inputs: list[str], out: str = "", **attributes: Any) -> str:
        out = out or f"tersenet_{self.name}_{len(self.made)}"
        self.made.append(self.onnx.helper.make_node(operator, inputs, [out], **attributes))
        return out

    def _own(self, name: str, value: NDArray[Any]) -> str:
        return self._shared(f"{self.name}_{name}", value)

    def _shared(self, name: str, value: NDArray[Any]) -> str:
        """A constant by its name, which all weights may use."""
        name = f"tersenet_{name}"
        if name not in self.constants:
            self.constants[name] = self.onnx.numpy_helper.from_array(value, name)
            self.graph.initializer.append(self.constants[name])
        return name
