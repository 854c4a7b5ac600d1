"""A quantized model in the operators of PyTorch's own quantization, for converters and compilers that read those.

LiteRT, ExecuTorch and Inductor recognise `quantize`, `dequantize` and an operator between them as one integer operator.
Their activations are int8 where ours are uint8: the same grid with every integer and the zero point less 128.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tersenet.bricks.coded import StoredLayer
from tersenet.bricks.quantized import Int8Conv2d, Int8Layer, Int8Linear, layer_config
from tersenet.bricks.quantizer import Quantizer
from tersenet.bricks.settle import settle
from tersenet.deploy.folded import folded_graph
from tersenet.graph.capture import Example
from tersenet.graph.points import is_concatenation, is_global_pool
from tersenet.graph.trace import trace
from tersenet.numerics.rounding import grid

_ops = torch.ops.quantized_decomposed
_LOW, _HIGH = grid(8, signed=True)


def rounds_activations(model: nn.Module) -> bool:
    """Whether a model computes with rounded activations, so that integer kernels can run it."""
    return any(isinstance(module, Quantizer) for module in model.modules())


@dataclass(frozen=True)
class Dialect:
    """What a converter or compiler asks for beyond the operators themselves. None of it changes a value.

    Args:
        float_weights: weights as floats that are quantized and dequantized; else as integers that are dequantized.
        unsigned: activations as uint8; else as int8.
        float_last: layers behind the last rounding in float, where there is no integer operator of a float result.
        alike_in_concat: what is concatenated is rounded to the grid of the result first.
        keep_axes: means over H and W keep both axes, and lose them afterwards.
    """

    float_weights: bool = False
    unsigned: bool = False
    float_last: bool = False
    alike_in_concat: bool = False
    keep_axes: bool = False


LITERT = Dialect(float_weights=True)
EXECUTORCH = Dialect(float_last=True, alike_in_concat=True, keep_axes=True)  # what XNNPACK delegates
INDUCTOR = Dialect(unsigned=True)


def decomposed(model: nn.Module, example: Example, dialect: Dialect) -> fx.GraphModule:
    """The same function in `quantized_decomposed` operators; the model is left as it was.

    Args:
        model: quantized by us, with activations.
        example: (N, ...), or all inputs; only their shapes and types are used.
    Raises:
        TraceError: when the forward cannot be captured.
    """
    graph = folded_graph(model, example)
    if dialect.alike_in_concat:
        _round_alike(graph)
    if dialect.keep_axes:
        _keep_axes(graph)
    last = _behind_the_last_rounding(graph) if dialect.float_last else set()
    for path, module in list(graph.named_modules()):
        if isinstance(module, Quantizer):
            graph.add_submodule(path, _Rounded(module, 0 if dialect.unsigned else 128))
        elif isinstance(module, StoredLayer) or (
            isinstance(module, Int8Layer) and (path in last or not module.input_quantized)
        ):
            graph.add_submodule(path, _float(module))
        elif isinstance(module, Int8Layer):
            graph.add_submodule(path, _Layer(module, dialect.float_weights))
    graph.recompile()
    return graph


def _quantizer(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), Quantizer)


def _round_alike(graph: fx.GraphModule) -> None:
    """Rounds the inputs of a concatenation as its result will be, which is then rounded to where it is already.

    Images go to the other grid through a depthwise convolution by 1, for which XNNPACK has an integer kernel; two
    roundings in a row it computes wrongly, because it loses the order of the axes between them.
    """
    for node in list(graph.graph.nodes):
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if not is_concatenation(node) or user is None or not _quantizer(graph, user):
            continue
        for source in node.all_input_nodes:
            if not _quantizer(graph, source) or source.target == user.target:
                continue
            with graph.graph.inserting_before(node):
                value = source
                if len(source.meta["shape"]) == 4:
                    path = f"alike_{node.name}_{source.name}"
                    graph.add_submodule(path, _by_one(int(source.meta["shape"][1])))
                    value = graph.graph.call_module(path, (source,))
                    value.meta = dict(source.meta)
                alike = graph.graph.call_module(str(user.target), (value,))
            alike.meta = dict(source.meta)
            node.replace_input_with(source, alike)


def _by_one(channels: int) -> Int8Conv2d:
    layer = Int8Conv2d(channels, channels, 1, groups=channels, bias=False)
    layer.weight.fill_(1)
    return layer.eval()


def _keep_axes(graph: fx.GraphModule) -> None:
    """Means over H and W as (N, C, 1, 1), rounded before the axes go as well as after."""
    for node in list(graph.graph.nodes):
        if not is_global_pool(graph, node) or len(node.meta["shape"]) != 2:
            continue
        with graph.graph.inserting_before(node):
            value = graph.graph.call_function(torch.ops.aten.mean.dim, (node.args[0], [2, 3], True))
            for user in [user for user in node.users if _quantizer(graph, user)][:1]:
                value = graph.graph.call_module(str(user.target), (value,))
            flat = graph.graph.call_function(torch.ops.aten.flatten.using_ints, (value, 1))
        flat.meta = dict(node.meta)
        node.replace_all_uses_with(flat)
        graph.graph.erase_node(node)


def _behind_the_last_rounding(graph: fx.GraphModule) -> set[str]:
    """Paths of the layers whose every call has no quantizer further on."""
    before: set[fx.Node] = set()  # nodes that a quantizer is made of
    for node in reversed(graph.graph.nodes):
        if _quantizer(graph, node) or node in before:
            before.update(node.all_input_nodes)
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    return {str(node.target) for node in calls} - {str(node.target) for node in calls if node in before}


def with_float_weights(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The same function with the weights of quantized layers as floats, for runtimes that have no type for them."""
    graph = trace(copy.deepcopy(model).eval(), example)
    settle(graph)
    for path, module in list(graph.named_modules()):
        if isinstance(module, StoredLayer | Int8Layer):
            graph.add_submodule(path, _float(module))
    graph.recompile()
    return graph


def _float(layer: Int8Layer | StoredLayer) -> nn.Module:
    """The torch.nn layer with the rounded weights as floats."""
    kind: Any = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    with torch.device("meta"):
        new = kind(**layer_config(layer))
    new.weight = nn.Parameter(layer.rounded_weight(), requires_grad=False)
    bias = layer.rounded_bias() if isinstance(layer, Int8Layer) else layer.bias
    new.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return new.train(layer.training)


class _Rounded(nn.Module):
    def __init__(self, quantizer: Quantizer, shift: int) -> None:
        super().__init__()
        # Numbers, not tensors: the converters read them from the graph.
        kind = torch.uint8 if shift == 0 else torch.int8
        zero, self.scale = int(quantizer.zero_point), float(quantizer.scale)
        self.grid = (zero - shift, -shift, 255 - shift, kind)
        # The runtimes' integers end at 8 bits, whatever the operators say; a grid of fewer ends before.
        ends = ((quantizer.low - zero) * self.scale, (quantizer.high - zero) * self.scale)
        self.ends = None if quantizer.bits == 8 else ends

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.ends is None else x.clamp(*self.ends)
        q = _ops.quantize_per_tensor.default(x, self.scale, *self.grid)
        return _ops.dequantize_per_tensor.default(q, self.scale, *self.grid)


class _Layer(nn.Module):
    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None

    def __init__(self, layer: Int8Layer, float_weights: bool) -> None:
        super().__init__()
        self.like = [layer]  # in a list, so that its own tensors are not this module's
        self.float_weights = float_weights
        self.register_buffer("weight", layer.rounded_weight() if float_weights else layer.weight)
        self.register_buffer("weight_scale", layer.weight_scale)
        self.register_buffer("weight_zero_point", torch.zeros(len(layer.weight), dtype=torch.int64))
        self.register_buffer("bias", layer.rounded_bias())

    def forward(self, x: Tensor) -> Tensor:
        layer, weight = self.like[0], self.weight
        grid = (self.weight_scale, self.weight_zero_point, 0, _LOW, _HIGH, torch.int8)
        if self.float_weights:
            weight = _ops.quantize_per_channel.default(weight, *grid)
        weight = _ops.dequantize_per_channel.default(weight, *grid)
        if isinstance(layer, Int8Linear):
            return F.linear(x, weight, self.bias)
        assert isinstance(layer, Int8Conv2d)
        return layer._conv_forward(x, weight, self.bias)
