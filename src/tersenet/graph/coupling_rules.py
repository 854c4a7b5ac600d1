"""What each operator between layers does to channel labels: one function per kind of operator, and one table.

A rule takes what is known of its inputs and gives the labels of its output, one vector or none per dimension. An
operator that is in no table freezes every label that reaches it. Shapes are those of the traced example.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import torch

from tersenet.graph.labels import Call, Shape, State, Vector, nothing, unknown


def same(call: Call) -> State:
    return call.input


def elementwise(call: Call) -> State:
    """Unites the inputs' channels, with broadcasting."""
    shape = call.shape
    result: list[Vector | None] = [None] * len(shape)
    inputs = [(call.states[n], n.meta["shape"]) for n in call.node.all_input_nodes if "shape" in n.meta]
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
            if len(labelled) > 1 and call.name in ("add", "sub"):
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


def reduction(call: Call) -> State:
    """Mean, maximum and sum over some dimensions; only a sum stays what it was when channels of zeros go."""
    state = call.input
    dims = call.arg(1, "dim")
    dims = list(range(len(state))) if dims is None or dims == [] else dims if isinstance(dims, list | tuple) else [dims]
    dims = {dim % len(state) for dim in dims}
    if call.name != "sum":
        call.freeze("works across them", *[state[dim] for dim in dims])
    if len(call.shape) == len(state):
        return tuple(None if dim in dims else labels for dim, labels in enumerate(state))
    return tuple(labels for dim, labels in enumerate(state) if dim not in dims)


def along(call: Call) -> State:
    """Softmax and others that work along one dimension."""
    state = call.input
    call.freeze("works across them", state[call.arg(1, "dim", -1)])
    return state


def permute(call: Call) -> State:
    state = call.input
    return tuple(state[dim] for dim in call.arg(1, "dims"))


def transpose(call: Call) -> State:
    state = list(call.input)
    if call.name == "t":
        return tuple(reversed(state))
    a, b = call.arg(1, "dim0"), call.arg(2, "dim1")
    state[a], state[b] = state[b], state[a]
    return tuple(state)


def unsqueeze(call: Call) -> State:
    state = list(call.input)
    dim = call.arg(1, "dim")
    state.insert(dim % len(call.shape), None)
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


def slicing(call: Call) -> State:
    state = list(call.input)
    dim = call.arg(1, "dim", 0)
    if call.shape[dim] != call.source.meta["shape"][dim]:
        call.freeze("takes a range of them with fixed bounds", state[dim])
        state[dim] = None
    return tuple(state)


def expand(call: Call) -> State:
    state, old = call.input, call.source.meta["shape"]
    lead = len(call.shape) - len(old)
    kept = [labels if old[i] == call.shape[lead + i] else None for i, labels in enumerate(state)]
    call.labels.literals += [(v, call.because("has a fixed size")) for v in kept if v is not None]
    return (*[None] * lead, *kept)


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


def chunk(call: Call) -> list[State]:
    """chunk and split into equal parts: the parts lose the same places. Unequal parts have fixed sizes."""
    state, size = call.input, call.source.meta["shape"]
    given = call.arg(1, "split_size")
    dim = call.arg(2, "dim", 0) % len(size)
    if call.name == "chunk":
        step = -(-size[dim] // given)
        sizes = [min(step, size[dim] - at) for at in range(0, size[dim], step)]
    elif isinstance(given, int):
        sizes = [min(given, size[dim] - at) for at in range(0, size[dim], given)]
    else:
        sizes = list(given)
    labels = state[dim]
    parts: list[Vector | None] = [None] * len(sizes)
    if labels is not None and len(set(sizes)) == 1:
        rows = labels.reshape(len(sizes), -1)
        call.labels.unite_rows(rows, call.because("meets channels that cannot be cut"))
        call.labels.literals.append((labels, call.because("has fixed sizes")))
        parts = list(rows)
    else:
        call.freeze("has parts of fixed and unequal sizes", labels)
    return [tuple(part if d == dim else v for d, v in enumerate(state)) for part in parts]


def pad(call: Call) -> State:
    """Padding beside channels adds positions that stay, because how many is written in the forward."""
    state = list(call.input)
    pads = list(call.arg(1, "pad"))
    constant = call.name == "constant_pad_nd" or call.arg(2, "mode", "constant") == "constant"
    for i in range(len(pads) // 2):
        before, after = pads[2 * i], pads[2 * i + 1]
        labels = state[-1 - i]
        if labels is None or before == after == 0:
            continue
        if not constant or before < 0 or after < 0:
            call.freeze("pads them with their own values, or crops them", labels)
            state[-1 - i] = None
            continue
        call.labels.literals.append((labels, call.because("pads by a fixed number")))
        state[-1 - i] = np.concatenate([np.zeros(before, np.int64), labels, np.zeros(after, np.int64)])
    return tuple(state)


def matmul(call: Call) -> State:
    a, b = (call.states[node] for node in call.node.all_input_nodes)
    if len(a) < 2 or len(b) < 2:
        unknown(call)
        return nothing(call)
    if a[-1] is not None and b[-2] is not None:
        call.labels.unite(a[-1], b[-2], call.because("meets channels that cannot be cut"))
    else:
        call.freeze("meets a tensor whose size is fixed", a[-1], b[-2])
    call.freeze("repeats the product over them", *a[:-2], *b[:-2])
    return (*[None] * (len(call.shape) - 2), a[-2], b[-1])


def getitem(call: Call) -> Any:
    state: Any = call.input
    return state[call.arg(1, "index")] if isinstance(state, list) else nothing(call)


def reshape(call: Call) -> State:
    """view, flatten, unflatten, squeeze: merges and splits dimensions."""
    sizes = call.arg(1, "size") if call.name in ("view", "reshape", "_unsafe_view") else None
    return regroup(call, sizes)


def regroup(call: Call, sizes: Any = None) -> State:
    """Labels through a change of shape that keeps the order of elements.

    A channel can only be cut if it is a whole slice of some dimension afterwards. Merged with others it becomes many
    positions of one label. Split into several dimensions, one of them shrinks (the one written as -1, else the last)
    and the positions along the others are united, which is what a channel shuffle needs.
    """
    state, old, new = call.input, call.source.meta["shape"], call.shape
    result: list[Vector | None] = [None] * len(new)
    for ins, outs in _blocks(old, new):
        labelled = [d for d in ins if state[d] is not None]
        if not labelled:
            continue
        wide = [d for d in outs if new[d] > 1]
        if len(labelled) > 1 or not wide:
            call.freeze("merges several dimensions of them", *[state[d] for d in ins])
            continue
        own = labelled[0]
        column = np.asarray(state[own]).reshape([-1 if d == own else 1 for d in ins])
        cells = np.broadcast_to(column, [old[d] for d in ins]).reshape([new[d] for d in wide])
        literal = sizes is not None and all(sizes[d] != -1 for d in wide)
        if literal:
            call.labels.literals.append((cells.ravel(), call.because("has a fixed size")))
        axis = _shrinking(cells, [sizes is not None and sizes[d] == -1 for d in wide])
        rows = np.moveaxis(cells, axis, -1).reshape(-1, cells.shape[axis])
        if not (rows == rows[0]).all():
            call.labels.unite_rows(rows, call.because("meets channels that cannot be cut"))
        result[wide[axis]] = rows[0]
    return tuple(result)


def _shrinking(cells: np.ndarray, open_: list[bool]) -> int:
    """Which dimension gets smaller: one along which alone the labels vary, else the open one, else the last."""
    for axis in range(cells.ndim):
        rows = np.moveaxis(cells, axis, -1).reshape(-1, cells.shape[axis])
        if (rows == rows[0]).all():
            return axis
    return open_.index(True) if True in open_ else cells.ndim - 1


def _blocks(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Runs of old and new dimensions that hold the same number of elements, from the front."""
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        ins, outs = ([i] if i < len(old) else []), ([j] if j < len(new) else [])
        i, j = i + 1, j + 1
        while (a := prod(old[d] for d in ins)) != (b := prod(new[d] for d in outs)):
            if a < b:
                ins.append(i)
                i += 1
            else:
                outs.append(j)
                j += 1
        blocks.append((ins, outs))
    return blocks


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
    "log_sigmoid lift_fresh_copy lift_fresh zeros_like ones_like full_like rand_like randn_like empty_like",
    nothing: "new_zeros new_ones new_full new_empty sym_size",
    spatial: "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
    "_upsample_nearest_exact2d reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d",
    spatial_pair: "max_pool2d_with_indices adaptive_max_pool2d adaptive_max_pool3d max_pool3d_with_indices",
    reduction: "mean sum amax amin var std logsumexp",
    along: "softmax log_softmax _softmax _log_softmax cumsum",
    permute: "permute", transpose: "transpose t swapaxes swapdims", unsqueeze: "unsqueeze", flip: "flip",
    select: "select", slicing: "slice", expand: "expand", concatenate: "cat concat", pad: "pad constant_pad_nd",
    chunk: "chunk split split_with_sizes", matmul: "matmul bmm mm", getitem: "getitem",
    reshape: "view reshape _unsafe_view flatten unflatten squeeze", pixel_shuffle: "pixel_shuffle",
}  # fmt: skip
OPERATORS = {name: rule for rule, names in _TABLE.items() for name in names.split()}


def operator(call: Call) -> Any:
    """The labels after an operator between layers."""
    rule = OPERATORS.get(call.name)
    if rule is None and torch.Tag.pointwise in getattr(call.node.target, "tags", ()):
        rule = elementwise
    if rule is None:
        unknown(call)
        return nothing(call)
    return rule(call)
