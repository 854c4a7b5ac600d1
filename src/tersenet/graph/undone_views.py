"""Views that a later view undoes, such as around a norm over features that was folded away.

They change nothing, and OpenVINO refuses some int8 graphs that have them behind an integer layer.
"""

from __future__ import annotations

import torch
from torch import fx, nn

aten = torch.ops.aten

# All of them keep the order of the values, so that one that gives the shape of before gives the values of before.
_VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.reshape_as.default, aten.view_as.default,
}  # fmt: skip
# Their second argument is read for its shape alone.
SHAPED_LIKE = {aten.reshape_as.default, aten.view_as.default, aten.expand_as.default}


def is_view(node: fx.Node) -> bool:
    """Whether a node gives the values of its first argument in their order, in another shape."""
    return node.op == "call_function" and node.target in _VIEWS


def drop_undone_views(graph: fx.GraphModule) -> None:
    """Takes out each view that gives the shape that an earlier one was made from. Exact."""
    for node in list(graph.graph.nodes):
        between = [node]
        while is_view(between[-1]) or _is_identity(graph, between[-1]):
            before = between[-1].args[0]
            if not isinstance(before, fx.Node):
                break
            between.append(before)
        same = [each for each in between[2:] if "shape" in node.meta and each.meta.get("shape") == node.meta["shape"]]
        if is_view(node) and same:
            node.replace_all_uses_with(same[-1])
            for each in between:
                if each is not same[-1] and not each.users:
                    graph.graph.erase_node(each)
    graph.recompile()


def _is_identity(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and type(graph.get_submodule(str(node.target))) is nn.Identity
