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
    """Takes out each view that gives the shape that an earlier one was made from, for every batch. Exact."""
    for node in list(graph.graph.nodes):
        between = [node]
        while is_view(between[-1]) or _is_identity(graph, between[-1]):
            before = between[-1].args[0]
            if not isinstance(before, fx.Node):
                break
            between.append(before)
        same = [each for each in between[2:] if _gives_shape_of(node, each)]
        if same:
            node.replace_all_uses_with(same[-1])
            for each in between:
                if each is not same[-1] and not each.users:
                    graph.graph.erase_node(each)
    graph.recompile()


def _gives_shape_of(node: fx.Node, other: fx.Node) -> bool:
    """Whether a view gives another value's shape whatever the batch is: a size that only the example has in common with
    it, such as a 2 in front, does not count. With all sizes but the first the same, the first one is, too."""
    if not is_view(node) or "shape" not in node.meta or node.meta["shape"] != other.meta.get("shape"):
        return False
    sizes = node.args[1]
    if isinstance(sizes, fx.Node):
        return sizes is other
    if not isinstance(sizes, list | tuple) or not all(isinstance(size, int) and size > 0 for size in sizes[1:]):
        return False
    return isinstance(sizes[0], fx.Node) or bool(sizes[0] == -1)


def _is_identity(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and type(graph.get_submodule(str(node.target))) is nn.Identity
