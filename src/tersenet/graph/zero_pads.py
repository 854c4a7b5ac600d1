"""Padding with zeros. 0 lies on every grid of activations, so what is padded keeps the grid that it had."""

from __future__ import annotations

import torch
from torch import fx
from torch.nn.modules.padding import _ConstantPadNd

aten = torch.ops.aten

_PADS = {aten.pad.default, aten.constant_pad_nd.default}


def pads_with_zeros(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node adds zeros at the edges of its one input, or cuts edges off."""
    if node.op == "call_module":
        layer = graph.get_submodule(str(node.target))
        return isinstance(layer, _ConstantPadNd) and float(layer.value) == 0
    if node.op != "call_function" or node.target not in _PADS:
        return False
    more = [*node.args[2:], *node.kwargs.values()]  # the mode and the value, or the value alone
    return all(each in (None, "constant", 0) for each in more)
