"""Operators that no runtime is to compute in integers: what lies around them is written so that none fuses them.

A runtime looks for patterns of rounded values around an operator. Where what it makes of one is wrong
(`tersenet.deploy.checked` finds out), the file is written again with the operator in float between the same roundings.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor, fx

from tersenet.bricks.quantized import Int8Conv2d

aten = torch.ops.aten


def in_float(x: Tensor) -> Tensor:
    """The same value, behind which no runtime starts an integer operator: none has one for a minimum of two values."""
    return torch.minimum(x, torch.full((), torch.finfo(x.dtype).max, dtype=x.dtype, device=x.device))


def keep_in_float(graph: fx.GraphModule, names: Collection[str]) -> None:
    """Puts `in_float` in front of every value that these nodes read, and adds biases apart, in place."""
    for node in [node for node in graph.graph.nodes if node.name in names]:
        for source in node.all_input_nodes:
            if source.op == "get_attr" or not getattr(source.meta.get("dtype"), "is_floating_point", False):
                continue
            with graph.graph.inserting_before(node):
                plain = graph.graph.call_function(in_float, (source,))
            plain.meta = dict(source.meta)
            node.replace_input_with(source, plain)
        if node.op == "call_module":
            _add_bias_apart(graph, node)
    graph.recompile()


def _add_bias_apart(graph: fx.GraphModule, node: fx.Node) -> None:
    """Adds the bias of an int8 convolution behind it: OpenVINO loses one that is its input, beside some shapes that are
    computed."""
    layer = graph.get_submodule(str(node.target))
    if not isinstance(layer, Int8Conv2d) or layer.bias is None:
        return
    bias = layer.bias if layer.input_scale is None else layer.bias * layer.bias_scale
    plain = copy.copy(layer)
    plain._buffers = {**layer._buffers, "bias": None}
    graph.add_submodule(f"{node.name}_without_bias", plain)
    graph.register_buffer(f"{node.name}_bias", bias.reshape(-1, 1, 1))
    node.target = f"{node.name}_without_bias"
    with graph.graph.inserting_after(node):
        held = graph.graph.get_attr(f"{node.name}_bias")
    with graph.graph.inserting_after(held):
        whole = graph.graph.call_function(aten.add.Tensor, (node, held))
    whole.meta = dict(node.meta)
    node.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)
