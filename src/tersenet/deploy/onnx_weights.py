"""Weights of few bits in ONNX files: packed codes, and the standard operators that make weights of them.

Codes are packed numbers (onnx_nodes), which become a weight by a scale or a codebook. ONNX has no type for most of
these formats, and of those that it has, few runtimes read all.

The exporter sees one operator of our own for each weight; `unpack_weights` puts the real ones in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.bricks.coded import StoredLayer
from tersenet.bricks.codes import BasesCode, Code, FloatCode, GridCode, PieceCode, TableCode, TernaryCode
from tersenet.deploy.onnx_nodes import ConstantNodes, replace, width
from tersenet.errors import ExportError
from tersenet.numerics.float_formats import FLOATS

_DOMAIN, _OPERATOR = "tersenet", "Weight"


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
        return "book", width(len(book)), [book]
    assert isinstance(code, TableCode)
    table = code.table()
    return ("book" if len(table) == 1 else "rows"), width(table.shape[1]), [table[0] if len(table) == 1 else table]


def _beside(scale: Tensor, code: Code) -> Tensor:
    """(O,) -> (O, 1, ...), to stand beside a weight."""
    return scale.reshape(-1, *(1,) * (len(code.shape) - 1))


def unpack_weights(onnx: Any, proto: Any) -> None:
    """Packs the codes of a file's `StoredAsOnnx` layers, and puts operators of ONNX in place of ours."""
    graph = proto.graph
    if not any(node.domain == _DOMAIN for node in graph.node):
        return
    made = ConstantNodes(onnx, graph)
    nodes = [new for node in graph.node for new in (_weight_of(made, node) if node.domain == _DOMAIN else [node])]
    replace(graph, nodes)
    for entry in [entry for entry in proto.opset_import if entry.domain == _DOMAIN]:
        proto.opset_import.remove(entry)


def _weight_of(made: ConstantNodes, node: Any) -> list[Any]:
    """The operators that stand for one of ours."""
    made.begin(node.output[0])
    settings = {each.name: made.onnx.helper.get_attribute_value(each) for each in node.attribute}
    kind, bits = settings["kind"].decode(), int(settings["bits"])
    shape = [int(size) for size in settings["shape"]]
    codes, shared, out = node.input[0], node.input[1:], node.output[0]
    if kind == "cast":
        made.node("Cast", [codes], out, to=made.onnx.TensorProto.FLOAT)
        return made.made
    numbers = made.onnx.numpy_helper.to_array(made.constants[codes])
    if kind == "grid":
        places = made.reshaped(made.numbers(numbers, bits), shape)
        whole = made.node("Cast", [places], to=made.onnx.TensorProto.FLOAT)
        made.node("Mul", [made.node("Sub", [whole, shared[0]]), shared[1]], out)
    elif kind == "scaled":
        places = made.reshaped(made.numbers(numbers, bits), shape)
        made.node("Mul", [made.node("Gather", [shared[0], places], axis=0), shared[1]], out)
    else:
        book = made.constants[shared[0]].dims
        made.found(shared[0], book if kind == "rows" else book[:1], made.numbers(numbers, bits), shape, out)
    return made.made
