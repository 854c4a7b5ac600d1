"""Operators that compute the same value twice become one."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx, nn


def merge_twins(graph: fx.GraphModule) -> None:
    """Merges activations and other operators of one and the same value that do the same, in place. Exact.

    A forward that writes `x.relu()` twice, as around a squeeze and excitation, has two activations of x. Neither is the
    only one that reads x, so that x would be rounded on its own, and behind each activation again; ONNX Runtime takes
    the two roundings for one.
    """
    known: dict[Hashable, fx.Node] = {}
    for node in list(graph.graph.nodes):
        key = _key(graph, node)
        if key is not None and (first := known.setdefault(key, node)) is not node:
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)
    graph.recompile()


def _key(graph: fx.GraphModule, node: fx.Node) -> Hashable:
    """What two nodes have in common that give the same value; None where nothing is known."""
    if len(node.all_input_nodes) != 1 or not getattr(node.meta.get("dtype"), "is_floating_point", False):
        return None  # sizes and indices are not rounded
    if node.op == "call_module":
        layer = graph.get_submodule(str(node.target))
        plain = type(layer).__module__ == nn.ReLU.__module__ and next(layer.parameters(), None) is None
        return (type(layer), layer.extra_repr(), node.args[0]) if plain else None
    schema: Any = getattr(node.target, "_schema", None)
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    if node.op != "call_function" or schema is None or schema.is_mutable or random:
        return None
    return (node.target, str(node.args), str(node.kwargs))
