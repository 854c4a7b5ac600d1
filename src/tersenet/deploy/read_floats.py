"""Where the export copy of an int8 network must read floats, or keep a rounding, for a runtime to compute it right.

Nothing here changes a value. An operator that no runtime has in integers, and that none moves a scale, a zero point or
a rounding through, is put in between. Found by comparing each runtime with the file's own meaning, form by form
(tests/deploy/int8_forms.py):

- OpenVINO 2026 merges a product with a constant into the rounding behind it, which it then computes wrong where the
  constant is negative; a layer scale, or a norm without a shift, is one. The product is kept apart.
- OpenVINO leaves the rounding of a convolution's result out where the convolution also takes over an addition
  further on (`Convolution::setPostOps` of its CPU plugin). What goes into the addition at once is simulated so
  (`merged_additions.py`); what is multiplied, subtracted or bent in between keeps its rounding.
- OpenVINO clips integers at bounds that are rounded to them; ONNX Runtime leaves out what a later rounding repeats and
  merges the two roundings around it into one. A clip between two grids, but a ReLU, reads floats.
- A variance is written with means of integers, of which OpenVINO loses the zero point, as of other means; it reads
  floats.
- A Pad along the channels adds zeros of the integers in OpenVINO, not of the values.
- ONNX Runtime's integer softmax is a table of 8-bit exponentials.
- ONNX Runtime rounds the float weights of a convolution, transposed ones too, or a Gemm to 8 bits by itself, one scale
  for all channels, where it stands between integers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersenet.bricks.brick import Brick
from tersenet.bricks.quantized import Int8Conv2d, Int8Layer
from tersenet.bricks.quantizer import Quantizer
from tersenet.graph.points import clip_bounds, constants, is_addition, only_moves

aten = torch.ops.aten

_PADS = {aten.pad.default, aten.constant_pad_nd.default}
_COMPOSED = {  # the softmax, and what the exporter writes with means of its input
    getattr(packet, overload)
    for packet in (aten.softmax, aten._softmax, aten.std, aten.var, aten.std_mean, aten.var_mean, aten.logsumexp)
    for overload in packet.overloads()
}
_PRODUCTS = {aten.mul.Tensor, aten.mul_.Tensor, aten.div.Tensor, aten.div_.Tensor, operator.mul, operator.truediv}
_SUMS = {aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor, operator.add, operator.sub}
_FLOAT_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_HUGE = 3e38


def read_floats(graph: fx.GraphModule) -> None:
    """Applies all of that to a quantized graph, in place."""
    fixed = constants(graph.graph.nodes)
    for node in list(graph.graph.nodes):
        layer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, Quantizer):
            _between_grids(graph, node)
        elif node.target in _COMPOSED or isinstance(layer, nn.Softmax) or _is_float(layer) or _pads_channels(node):
            if quantizer_of(graph, node.args[0]) is not None:
                _put_in_front(graph, node, node.args[0], plain_float)
        elif node.target in _PRODUCTS or isinstance(layer, _NORMS):
            if _may_flip(graph, node, layer, fixed):
                _put_behind(graph, node, plain_float)
        elif node.target in _SUMS:
            _keep_rounding(graph, node, fixed)
    graph.recompile()


def plain_float(x: Tensor) -> Tensor:
    """x, by an operator that OpenVINO moves no zero point through and takes out nowhere."""
    return torch.onnx.ops.symbolic("Max", (x, torch.tensor(-_HUGE)), dtype=x.dtype, shape=x.shape)


def read_twice(x: Tensor) -> Tensor:
    """x, by an operator that OpenVINO cannot take into the kernel that computes x."""
    return torch.onnx.ops.symbolic("Max", (x, x), dtype=x.dtype, shape=x.shape)


def quantizer_of(graph: fx.GraphModule, node: Any) -> str | None:
    """The path of the quantizer that a value comes from, moved or chosen at most; None where it is a float."""
    while isinstance(node, fx.Node):
        if _is(graph, node, Quantizer):
            return str(node.target)
        if not only_moves(graph, node):
            return None
        node = node.args[0]
    return None


def _between_grids(graph: fx.GraphModule, node: fx.Node) -> None:
    """Keeps a second rounding, behind a clip, apart from a first one to another grid."""
    reader, source, bounds = node, node.args[0], set()
    while isinstance(source, fx.Node) and (clip := clip_bounds(graph, source)) is not None:
        bounds.add(clip)
        reader, source = source, source.args[0]
    # Behind a ReLU alone OpenVINO lost a bias, where ONNX Runtime is off by a rounding.
    if bounds - {(0.0, math.inf)} and quantizer_of(graph, source) not in (None, node.target):
        _put_in_front(graph, reader, source, plain_float)


def _is_float(layer: nn.Module | None) -> bool:
    """Whether a layer is left in float; bricks hold few bits."""
    return isinstance(layer, _FLOAT_LAYERS) and not isinstance(layer, Brick)


def _pads_channels(node: fx.Node) -> bool:
    if node.target not in _PADS:
        return False
    sides: Any = node.args[1]
    rank = len(node.all_input_nodes[0].meta.get("shape", ()))
    return len(sides) >= 2 * (rank - 1) and any(sides[2 * (rank - 2) :])


def _may_flip(graph: fx.GraphModule, node: fx.Node, layer: nn.Module | None, fixed: Collection[fx.Node]) -> bool:
    """Whether a value is multiplied by constants that are negative, or not known, and nothing is added."""
    if layer is not None:
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        return weight is not None and bool((weight < 0).any()) and (bias is None or not bool(bias.any()))
    constant = [source for source in node.all_input_nodes if source in fixed]
    return len(node.all_input_nodes) == 2 and len(constant) == 1 and _is_negative(graph, constant[0])


def _is_negative(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a constant has negative numbers; those that cannot be computed here may have."""
    value = _value(graph, node)
    return value is None or bool((value < 0).any())


def _value(graph: fx.GraphModule, node: fx.Node) -> Tensor | None:
    if node.op == "get_attr":
        return torch.fx.graph_module._get_attr(graph, str(node.target)).detach()
    values = {source: _value(graph, source) if source.op != "placeholder" else None for source in node.all_input_nodes}
    if node.op != "call_function" or any(value is None for value in values.values()):
        return None
    arguments = fx.map_arg((node.args, dict(node.kwargs)), lambda source: values[source])
    with torch.no_grad():
        return node.target(*arguments[0], **arguments[1])  # type: ignore[operator]


def _keep_rounding(graph: fx.GraphModule, node: fx.Node, fixed: Collection[fx.Node]) -> None:
    """Keeps the rounding of a convolution whose result goes through more than an addition into an addition."""
    operands = [source for source in node.all_input_nodes if source not in fixed]
    if len(operands) != 2:
        return
    for at in operands:
        bent = not is_addition(node)
        while len(at.users) == 1 and not only_moves(graph, at):
            sources = [source for source in at.all_input_nodes if source not in fixed]
            if len(sources) != 1 or _is(graph, at, Int8Layer):
                break
            if _is(graph, at, Quantizer) and _is(graph, sources[0], Int8Conv2d):
                if bent and len(sources[0].users) == 1:
                    _put_behind(graph, at, read_twice)
                break
            at, bent = sources[0], True


def _put_in_front(graph: fx.GraphModule, node: fx.Node, source: Any, function: Any) -> None:
    """One for all that read the same value: beside several, OpenVINO loses the bias of the layer before them."""
    same = next((user for user in source.users if user.target is function), None)
    if same is None:
        with graph.graph.inserting_after(source):
            same = graph.graph.call_function(function, (source,))
        same.meta = dict(source.meta)
    node.replace_input_with(source, same)


def _put_behind(graph: fx.GraphModule, node: fx.Node, function: Any) -> None:
    with graph.graph.inserting_after(node):
        same = graph.graph.call_function(function, (node,))
    same.meta = dict(node.meta)
    node.replace_all_uses_with(same, lambda user: user is not same)


def _is(graph: fx.GraphModule, node: Any, kind: type[nn.Module]) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and isinstance(graph.get_submodule(str(node.target)), kind)
    )
