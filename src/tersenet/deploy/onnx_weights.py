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
        plain = self.kind in ("cast", "dequantize")
        codes = layer.codes if plain else (layer.codes.to(torch.int16) - lowest).to(torch.uint8)
        self.register_buffer("codes", codes)
        self.names = [f"shared_{number}" for number in range(len(shared))]
        for name, value in zip(self.names, shared, strict=True):
            self.register_buffer(name, value.detach().contiguous())

    def weight(self) -> Tensor:
        inputs = (self.codes, *(getattr(self, name) for name in self.names))
        if self.kind == "dequantize":
            axis: dict[str, Any] = {"axis": 0} if inputs[1].dim() else {}
            return torch.onnx.ops.symbolic("DequantizeLinear", inputs, axis, dtype=inputs[1].dtype, shape=self.shape)
        attributes: dict[str, Any] = {"kind": self.kind, "bits": self.bits, "shape": self.shape}
        return torch.onnx.ops.symbolic(
            f"{_DOMAIN}::{_OPERATOR}", inputs, attributes, dtype=torch.float32, shape=self.shape, version=1
        )

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        if isinstance(layer, nn.Conv2d):
            return layer._conv_forward(x, self.weight(), layer.bias)
        return F.linear(x, self.weight(), layer.bias)


def _parts(code: Any) -> tuple[str, int, list[Tensor]]:
    """What makes weights of a code's numbers: (how, bits of a number, what is shared).

    dequantize: integers for DequantizeLinear. cast: the numbers are floats. grid: (number - zero point) * scale. book:
    the entry of a list, of single weights or of pieces. rows: the entry of a list that each output has. scaled: the
    entry of a list, times a scale.
    """
    if isinstance(code, GridCode):
        if code.signed and not isinstance(code.granularity, int):
            return "dequantize", code.bits, [code.scale[:, 0] if code.granularity == "channel" else code.scale[0, 0]]
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


def make_floats_once(onnx: Any, proto: Any) -> None:
    """Int8 weights of operators with float input become float by Cast and Mul instead of DequantizeLinear.

    ONNX Runtime keeps DequantizeLinear of constants for its integer kernels, which need an integer input; without one
    it made the weights anew for every batch, at twice the time of the float network. Cast and Mul it does at loading.
    """
    graph = proto.graph
    made, nodes = _Unpacker(onnx, graph), []
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
            nodes += made.multiplied(node, weight)
    _replace(graph, nodes)


_MOVES = ("Transpose", "Reshape", "Flatten", "MaxPool", "Squeeze", "Unsqueeze", "Slice", "Pad")


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
    made, nodes = _Unpacker(onnx, graph), []
    for tensor in list(graph.initializer):
        if len(tensor.dims) < 2 or tensor.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT8):
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

    def multiplied(self, node: Any, weight: Any) -> list[Any]:
        """The operators that stand for a DequantizeLinear of a constant."""
        self.made, self.name = [], node.output[0]
        axis = next((each.i for each in node.attribute if each.name == "axis"), 1)
        beside = [-1 if each == axis else 1 for each in range(len(weight.dims))]

        def put(name: str) -> str:
            value = self.onnx.numpy_helper.to_array(self.constants[name]).astype(np.float32)
            return self._own(name, value.reshape(beside) if value.ndim else value)

        found = self._node("Cast", [node.input[0]], to=self.onnx.TensorProto.FLOAT)
        if len(node.input) > 2 and self.onnx.numpy_helper.to_array(self.constants[node.input[2]]).any():
            found = self._node("Sub", [found, put(node.input[2])])
        self._node("Mul", [found, put(node.input[1])], node.output[0])
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
