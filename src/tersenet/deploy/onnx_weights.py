"""Weights of few bits in ONNX files: packed codes, and the standard operators that make weights of them.

Codes are cut into digits of 8, 4, 2 and 1 bits (3 bits are 2 + 1), the digits of one width are packed into bytes; a
byte is looked up in a table of its digits (Gather), the digits are put together, and become a weight by a scale or a
codebook. All of it hangs on constants alone, so runtimes work it out once, when they load the file. ONNX has no type
for most of these formats, and of those that it has, few runtimes read all.

The exporter sees one operator of our own for each weight; `unpack_weights` puts the real ones in its place.
"""

from __future__ import annotations

import copy
import math
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
        self.register_buffer("codes", layer.codes if plain else (layer.codes.to(torch.int16) - lowest).to(torch.uint8))
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


def pack_integers(onnx: Any, proto: Any) -> None:
    """Packs the int8 weights of a file that need fewer bits. What DequantizeLinear reads stays int8."""
    graph = proto.graph
    made, nodes = _Unpacker(onnx, graph), []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in made.constants:
            tensor = made.constants[node.input[0]]
            if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1:
                new, node.input[0] = made.packed(tensor)
                nodes += new
        nodes.append(node)
    _replace(graph, nodes)


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
        self.packed_names: set[str] = set()

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
        elif kind == "rows":
            places = self._reshaped(self._numbers(numbers, bits), [shape[0], math.prod(shape[1:])])
            self._reshaped(self._node("GatherElements", [shared[0], places], axis=1), shape, out)
        else:
            self._reshaped(self._node("Gather", [shared[0], self._numbers(numbers, bits)], axis=0), shape, out)
        return self.made

    def packed(self, tensor: Any) -> tuple[list[Any], str]:
        """The operators that make an int8 constant of packed ones, and its new name; none where that saves nothing."""
        whole = self.onnx.numpy_helper.to_array(tensor).astype(np.int32)
        lowest, shape = int(whole.min()), list(whole.shape)
        bits = _width(int(whole.max()) - lowest + 1)
        self.made, self.name = [], f"{tensor.name}_unpacked"
        if self.name in self.packed_names:  # another operator reads the same constant
            return [], self.name
        if whole.size * (8 - bits) // 8 <= _OPERATORS_TAKE:
            return [], tensor.name
        self.packed_names.add(self.name)
        places = self._reshaped(self._numbers((whole - lowest).astype(np.uint8), bits), shape)
        shift = self._shared(f"lowest_{lowest}", np.array(lowest, np.int32))
        self._node("Cast", [self._node("Add", [places, shift])], self.name, to=self.onnx.TensorProto.INT8)
        return self.made, self.name

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
