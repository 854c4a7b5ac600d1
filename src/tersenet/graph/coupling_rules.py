"""What each operator between layers does to channel labels: one function per kind of operator, and one table.

A rule takes what is known of its inputs and gives the labels of its output, one vector or none per dimension. An
operator that is in no table freezes every label that reaches it. Shapes are those of the traced example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tersenet.graph.coupling_products import PRODUCTS
from tersenet.graph.coupling_reductions import REDUCTIONS
from tersenet.graph.coupling_shapes import SHAPES
from tersenet.graph.labels import Call, State, Vector, nothing, unknown
from tersenet.graph.skips import is_residual


def same(call: Call) -> State:
    return call.input


def elementwise(call: Call) -> State:
    """Unites the inputs' channels, with broadcasting."""
    shape = call.shape
    result: list[Vector | None] = [None] * len(shape)
    nodes = [n for n in call.node.all_input_nodes if "shape" in n.meta]
    inputs = [(call.states[n], n.meta["shape"]) for n in nodes]
    residual = call.name in ("add", "sub") and len(nodes) > 1 and is_residual(nodes[0], nodes[1])
    for back in range(1, len(shape) + 1):
        parts = [
            state[-back] for state, size in inputs if len(size) >= back and not (size[-back] == 1 and shape[-back] > 1)
        ]
        labelled = [part for part in parts if part is not None]
        if len(labelled) < len(parts):
            call.freeze("meets a tensor whose size is fixed", *labelled)
        for other in labelled[1:]:
            call.labels.unite(labelled[0], other, call.because("meets channels that cannot be cut"))
        if labelled:
            result[-back] = labelled[0]
            if len(labelled) > 1 and residual:
                call.labels.added.append(labelled[0])
    return tuple(result)


def spatial(call: Call) -> State:
    """Pooling, resizing and the like: channels pass, and what they move over must not be channels."""
    state = call.input
    call.freeze("works along them", *state[2:])
    return (*state[:2], *[None] * (len(call.shape) - 2))


def spatial_pair(call: Call) -> list[State]:
    """Max pooling that also gives the places."""
    state = call.input
    call.freeze("works along them", *state[2:])
    passed = (*state[:2], *[None] * (len(state) - 2))
    return [passed, passed]


def unpool(call: Call) -> State:
    """Max unpooling: values go back to their places; both inputs hold the same channels."""
    state = call.input
    places = call.states[call.arg(1, "indices")]
    call.freeze("works along them", *state[2:], *places[2:])
    if state[1] is not None and places[1] is not None:
        call.labels.unite(state[1], places[1], call.because("meets channels that cannot be cut"))
    elif state[1] is not None or places[1] is not None:
        call.freeze("meets a tensor whose size is fixed", state[1], places[1])
        return nothing(call)
    return (*state[:2], *[None] * (len(state) - 2))


def shuffle(call: Call) -> State:
    """(G, K) channels -> (K, G): the groups lose the same places."""
    state = call.input
    if state[1] is None:
        return state
    rows = state[1].reshape(call.arg(1, "groups"), -1)
    call.labels.unite_rows(rows, call.because("meets channels that cannot be cut"))
    return (state[0], rows.T.reshape(-1), *state[2:])


def permute(call: Call) -> State:
    state = call.input
    return tuple(state[dim] for dim in call.arg(1, "dims"))


def transpose(call: Call) -> State:
    state = list(call.input)
    if call.name in ("t", "numpy_T"):
        return tuple(reversed(state))
    a, b = call.arg(1, "dim0"), call.arg(2, "dim1")
    state[a], state[b] = state[b], state[a]
    return tuple(state)


def movedim(call: Call) -> State:
    """Some dimensions go to new places, the others keep their order."""
    state = call.input
    rank = len(state)
    pairs = [value if isinstance(value, list | tuple) else [value] for value in call.node.args[1:3]]
    source, target = ([int(dim) % rank for dim in dims] for dims in pairs)  # type: ignore[arg-type]
    rest = iter(dim for dim in range(rank) if dim not in source)
    return tuple(state[source[target.index(d)] if d in target else next(rest)] for d in range(rank))


def swapped(call: Call) -> State:
    """mT: the last two dimensions."""
    state = call.input
    return (*state[:-2], state[-1], state[-2])


def unsqueeze(call: Call) -> State:
    state = list(call.input)
    dim = call.arg(1, "dim")
    state.insert(dim % len(call.shape), None)
    return tuple(state)


def narrow(call: Call) -> State:
    """A range of other dimensions; which channels a range of them holds is written in the forward."""
    state = list(call.input)
    dim = call.arg(1, "dim")
    if call.shape[dim] != call.source.meta["shape"][dim]:
        call.freeze("takes some of them by their number", state[dim])
        state[dim] = None
    return tuple(state)


def flip(call: Call) -> State:
    state = list(call.input)
    for dim in call.arg(1, "dims"):
        labels = state[dim]
        state[dim] = None if labels is None else labels[::-1]
    return tuple(state)


def select(call: Call) -> State:
    state = list(call.input)
    dim = call.arg(1, "dim", 0)
    call.freeze("takes one of them by its number", state[dim])
    del state[dim]
    return tuple(state)


def concatenate(call: Call) -> State:
    nodes = [node for node in call.source if node.meta["shape"] != (0,)]
    dim = call.arg(1, "dim", 0) % len(call.shape)
    states = [call.states[node] for node in nodes]
    result: list[Vector | None] = []
    for d in range(len(call.shape)):
        column = [state[d] for state in states]
        if all(part is None for part in column):
            result.append(None)
            continue
        fixed = [np.zeros(n.meta["shape"][d], np.int64) if p is None else p for p, n in zip(column, nodes, strict=True)]
        if d == dim:
            result.append(np.concatenate(fixed))
        else:
            call.labels.unite_rows(np.stack(fixed), call.because("meets channels that cannot be cut"))
            result.append(fixed[0])
    return tuple(result)


def getitem(call: Call) -> Any:
    state: Any = call.input
    return state[call.arg(1, "index")] if isinstance(state, list) else nothing(call)


def pixel_shuffle(call: Call) -> State:
    """(C r r) channels -> C: each channel takes its r r parts with it."""
    state = call.input
    if len(state) != 4:
        unknown(call)
        return nothing(call)
    call.freeze("works along them", *state[2:])
    if state[1] is None:
        return nothing(call)
    rows = state[1].reshape(call.shape[1], -1).T
    call.labels.unite_rows(rows, call.because("meets channels that cannot be cut"))
    return (state[0], rows[0], None, None)


_TABLE: dict[Callable[[Call], Any], str] = {
    same: "contiguous clone alias detach to _to_copy type_as float dropout feature_dropout alpha_dropout relu relu6 "
    "silu mish hardtanh hardswish hardsigmoid leaky_relu elu selu celu gelu sigmoid tanh softplus logsigmoid "
    "log_sigmoid threshold rrelu feature_alpha_dropout atleast_1d "
    "lift_fresh_copy lift_fresh zeros_like ones_like full_like rand_like randn_like "
    "empty_like",
    nothing: "sym_size",
    spatial: "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
    "_upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d "
    "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d",
    spatial_pair: "max_pool1d_with_indices max_pool2d_with_indices adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d max_pool3d_with_indices",
    permute: "permute", transpose: "transpose t swapaxes swapdims numpy_T", movedim: "movedim moveaxis",
    swapped: "mT adjoint", unsqueeze: "unsqueeze", flip: "flip",
    narrow: "narrow", unpool: "max_unpool2d max_unpool3d", shuffle: "channel_shuffle native_channel_shuffle",
    # the second names of pointwise operators, which torch does not mark as such
    elementwise: "expand_as absolute negative arccos arccosh arcsin arcsinh arctan arctan2 arctanh less less_equal "
    "greater greater_equal not_equal multiply subtract rsub divide true_divide floor_divide clip fix square "
    "float_power",
    select: "select", concatenate: "cat concat", getitem: "getitem", pixel_shuffle: "pixel_shuffle",
    **REDUCTIONS, **SHAPES, **PRODUCTS,
}  # fmt: skip
OPERATORS = {name: rule for rule, names in _TABLE.items() for name in names.split()}


def operator(call: Call) -> Any:
    """The labels after an operator between layers."""
    rule = OPERATORS.get(call.name)
    # One of several outputs, such as frexp's, has no shape of its own.
    pointwise = torch.Tag.pointwise in getattr(call.node.target, "tags", ()) and "shape" in call.node.meta
    if pointwise and (rule is None or len(call.node.all_input_nodes) > 1):  # max of two tensors is no reduction
        rule = elementwise
    if rule is None:
        unknown(call)
        return nothing(call)
    return rule(call)
