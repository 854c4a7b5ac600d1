"""Writes the sizes in a traced graph anew after a cut: of views, splits, slices, paddings, norms and new tensors.

What a size has to be follows from the channels that are left of each dimension. The scale of an attention stays that
of the uncut model, so that channels of zeros can go and nothing else changes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import fx

from tersenet.graph.coupling_shapes import pads_of, part_sizes
from tersenet.graph.labels import Call, Labels

aten = torch.ops.aten


@dataclass(frozen=True)
class Share:
    """A size that is computed from the batch, of which so much is left."""

    node: fx.Node
    left: int
    of: int


@dataclass(frozen=True)
class Rewrite:
    """What an operator is to be called with.

    Args:
        target: the operator.
        args: without the kwargs; a size may be a Share.
        audible: whether the forward as it was written would fail on a cut tensor, and not just compute another thing.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    audible: bool = True


@dataclass(frozen=True)
class _Sizes:
    """One operator, and what is left of the dimensions around it."""

    call: Call
    gone: np.ndarray

    def left(self, labels: np.ndarray) -> int:
        return len(labels) - int(self.gone[labels].sum())

    def with_argument(self, place: int, name: str, value: Any, audible: bool = True) -> Rewrite:
        node = self.call.node
        if len(node.args) > place:
            args = (*node.args[:place], value, *node.args[place + 1 :])
            return Rewrite(node.target, args, dict(node.kwargs), audible)
        return Rewrite(node.target, node.args, {**node.kwargs, name: value}, audible)

    def written(self, sizes: Sequence[Any], state: Sequence[Any]) -> list[Any]:
        """A list of sizes with what is left of each dimension; -1 stays."""
        found: list[Any] = []
        for size, labels in zip(sizes, state, strict=True):
            if labels is None or (isinstance(size, int) and size == -1) or not self.gone[labels].any():
                found.append(size)
            elif isinstance(size, int):
                found.append(self.left(labels))
            else:
                left = self.left(labels)
                share = gcd(left, len(labels))
                found.append(Share(size, left // share, len(labels) // share))
        return found


def rewrites(nodes: Sequence[fx.Node], states: dict[fx.Node, Any], gone: np.ndarray) -> dict[str, Rewrite]:
    """Name of a node -> what it is to be called with once some classes are gone; nodes that stay are not in it.

    Args:
        states: node -> classes per dimension.
        gone: (classes,) bool.
    """
    found = {}
    for node in nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        call = Call(Labels(), node, states)
        rule = _RULES.get(call.name)
        new = None if rule is None else rule(_Sizes(call, gone))
        if new is not None and (new.target, new.args, new.kwargs) != (node.target, node.args, node.kwargs):
            found[node.name] = new
    return found


def resize(graph: fx.GraphModule, found: dict[str, Rewrite]) -> None:
    """Carries rewrites out in a graph whose nodes have these names."""
    for node in list(graph.graph.nodes):
        if node.name not in found:
            continue
        new = found[node.name]
        names = {source.name: source for source in node.all_input_nodes}
        with graph.graph.inserting_before(node):
            node.args, node.kwargs = (_placed(graph.graph, part, names) for part in (new.args, new.kwargs))
        node.target = new.target
    graph.recompile()


def _placed(graph: fx.Graph, value: Any, names: dict[str, fx.Node]) -> Any:
    """An argument of another graph with the same names, in this one."""
    if isinstance(value, fx.Node):
        return names[value.name]
    if isinstance(value, Share):
        times = graph.call_function(operator.mul, (names[value.node.name], value.left))
        return graph.call_function(operator.floordiv, (times, value.of))
    if isinstance(value, dict):
        return {key: _placed(graph, part, names) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_placed(graph, part, names) for part in value)
    return value


# --- one rule per kind of operator -------------------------------------------------------------------------------


def _output_sizes(s: _Sizes) -> Rewrite:
    place = 0 if s.call.name in ("zeros", "ones", "full", "empty", "rand", "randn") else 1
    return s.with_argument(place, "size", s.written(s.call.arg(place, "size"), s.call.states[s.call.node]))


def _unflatten(s: _Sizes) -> Rewrite:
    dim, sizes = s.call.arg(1, "dim") % len(s.call.source.meta["shape"]), s.call.arg(2, "sizes")
    state = s.call.states[s.call.node]
    return s.with_argument(2, "sizes", s.written(sizes, state[dim : dim + len(sizes)]))


def _split(s: _Sizes) -> Rewrite | None:
    parts = s.call.states[s.call.node]
    dim, old = part_sizes(s.call)
    new = [size if part[dim] is None else s.left(part[dim]) for size, part in zip(old, parts, strict=True)]
    if new == old or (s.call.name.endswith("chunk") and len(set(new)) == 1):
        return None
    if len(set(new)) == 1 and isinstance(s.call.arg(1, "split_size"), int):
        return s.with_argument(1, "split_size", new[0])
    return Rewrite(aten.split_with_sizes.default, (s.call.source, new, dim), {})


def _slice(s: _Sizes) -> Rewrite | None:
    dim, size = s.call.arg(1, "dim", 0), s.call.source.meta["shape"]
    labels = s.call.input[dim]
    if labels is None or s.call.shape[dim] == size[dim]:
        return None
    start, end, _ = slice(s.call.arg(2, "start"), s.call.arg(3, "end")).indices(size[dim])
    first = s.left(labels[:start])
    last = first + s.left(labels[start:end])
    if (first, last) == (start, end):
        return None
    return Rewrite(aten.slice.Tensor, (s.call.source, dim, first, last), {}, audible=False)


def _pad(s: _Sizes) -> Rewrite:
    pads = list(s.call.arg(1, "pad"))
    state = s.call.states[s.call.node]
    for dim, (before, after) in pads_of(s.call).items():
        labels = state[dim]
        if labels is not None and (before or after):
            at = 2 * (len(state) - 1 - dim)
            pads[at], pads[at + 1] = s.left(labels[:before]), s.left(labels[len(labels) - after :])
    return s.with_argument(1, "pad", pads)


def _normalized(s: _Sizes) -> Rewrite:
    shape = s.call.arg(1, "normalized_shape")
    return s.with_argument(1, "normalized_shape", s.written(shape, s.call.states[s.call.node][-len(shape) :]))


def _groups(place: int, name: str) -> Callable[[_Sizes], Rewrite | None]:
    """Where every channel is a group of its own, there are as many groups as channels."""

    def rule(s: _Sizes) -> Rewrite | None:
        labels = s.call.input[1]
        if labels is None or s.call.arg(place, name, 1) != len(labels) or len(labels) == 1:
            return None
        return s.with_argument(place, name, s.left(labels))

    return rule


def _attention(s: _Sizes) -> Rewrite | None:
    labels = s.call.input[-1]
    if labels is None or s.call.node.kwargs.get("scale") is not None or not s.gone[labels].any():
        return None
    kwargs = {**s.call.node.kwargs, "scale": float(len(labels)) ** -0.5}
    return Rewrite(s.call.node.target, s.call.node.args, kwargs, audible=False)


_TABLE: dict[Callable[[_Sizes], Rewrite | None], str] = {
    _output_sizes: "view reshape _unsafe_view expand zeros ones full empty rand randn new_zeros new_ones new_full "
    "new_empty",
    _unflatten: "unflatten",
    _split: "chunk unsafe_chunk split unsafe_split split_with_sizes unsafe_split_with_sizes",
    _slice: "slice", _pad: "pad constant_pad_nd", _normalized: "layer_norm rms_norm",
    _groups(1, "num_groups"): "group_norm", _groups(6, "groups"): "conv1d conv2d conv3d", _attention:
    "scaled_dot_product_attention",
}  # fmt: skip
_RULES = {name: rule for rule, names in _TABLE.items() for name in names.split()}
