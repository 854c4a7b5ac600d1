"""What operators that change or name sizes do to channel labels: reshaping, splitting, slicing, padding, creating.

Sizes that are written into a forward are no obstacle here: `graph/literals.py` writes them anew after a cut.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from tersenet.graph.labels import Call, Shape, Split, State, Vector


def expand(call: Call) -> State:
    state, old = call.input, call.source.meta["shape"]
    lead = len(call.shape) - len(old)
    kept = [labels if old[i] == call.shape[lead + i] else None for i, labels in enumerate(state)]
    return (*[None] * lead, *kept)


def part_sizes(call: Call) -> tuple[int, list[int]]:
    """(dimension, sizes of the parts) of a chunk or a split."""
    size = call.source.meta["shape"]
    default = 0
    dim = call.arg(2, "dim", default) % len(size)
    if call.name in ("chunk", "unsafe_chunk"):
        step = -(-size[dim] // call.arg(1, "chunks"))
        return dim, [min(step, size[dim] - at) for at in range(0, size[dim], step)]
    given = call.arg(1, "split_sizes" if call.name.endswith("with_sizes") else "split_size")
    if isinstance(given, int):
        return dim, [min(given, size[dim] - at) for at in range(0, size[dim], given)]
    return dim, list(given)


def chunk(call: Call) -> list[State]:
    """chunk and split. Equal parts lose the same places, so that the parts of a cut tensor are equal too."""
    state = call.input
    dim, sizes = part_sizes(call)
    labels = state[dim]
    if labels is None:
        return [state] * len(sizes)
    if len(set(sizes)) == 1 and len(sizes) > 1:
        call.labels.unite_rows(labels.reshape(len(sizes), -1), call.because("meets channels that cannot be cut"))
    parts = np.split(labels, np.cumsum(sizes)[:-1])
    return [tuple(part if d == dim else v for d, v in enumerate(state)) for part in parts]


def slicing(call: Call) -> State:
    """A range of channels is that range of labels; every second one and the like cannot be written as a range."""
    state = list(call.input)
    dim = call.arg(1, "dim", 0)
    labels = state[dim]
    if labels is None or call.shape[dim] == call.source.meta["shape"][dim]:
        return tuple(state)
    start, end, step = call.arg(2, "start"), call.arg(3, "end"), call.arg(4, "step", 1)
    if step != 1 or not all(bound is None or isinstance(bound, int) for bound in (start, end)):
        call.freeze("takes some of them by their number", labels)
        state[dim] = None
    else:
        state[dim] = labels[start:end]
    return tuple(state)


def pads_of(call: Call) -> dict[int, tuple[int, int]]:
    """dimension -> (before, after) of a padding, both above or below zero as it says."""
    pads = list(call.arg(1, "pad"))
    rank = len(call.shape)
    return {rank - 1 - i: (pads[2 * i], pads[2 * i + 1]) for i in range(len(pads) // 2)}


def pad(call: Call) -> State:
    """Padding beside channels with a number adds channels; they are cut where others that they meet are cut."""
    state = list(call.input)
    constant = call.name == "constant_pad_nd" or call.arg(2, "mode", "constant") == "constant"
    for dim, (before, after) in pads_of(call).items():
        labels = state[dim]
        if labels is None or before == after == 0:
            continue
        if constant and isinstance(before, int) and isinstance(after, int) and before >= 0 and after >= 0:
            state[dim] = np.concatenate([call.labels.fresh(before), labels, call.labels.fresh(after)])
        else:
            call.freeze("pads them with their own values, or crops them", labels)
            state[dim] = None
    return tuple(state)


def created(call: Call) -> State:
    """zeros, new_full and the like: every size that is a written number can be written anew."""
    sizes = call.arg(1, "size") if call.name.startswith("new_") else call.arg(0, "size")
    return tuple(call.labels.fresh(size) if isinstance(size, int) and size > 1 else None for size in sizes)


def repeat(call: Call) -> State:
    state, repeats = call.input, list(call.arg(1, "dims" if call.name == "tile" else "repeats"))
    repeats = [1] * (len(state) - len(repeats)) + repeats  # tile may name the last dimensions only
    lead = len(repeats) - len(state)
    found = [
        np.tile(v, n) if v is not None and isinstance(n, int) else v for v, n in zip(state, repeats[lead:], strict=True)
    ]
    for before, after, size in zip(state, found, call.shape[lead:], strict=True):
        if after is not None and len(after) != size:
            call.freeze("repeats them", before)
    sound = [v if v is None or len(v) == n else None for v, n in zip(found, call.shape[lead:], strict=True)]
    return (*[None] * lead, *sound)


def repeat_interleave(call: Call) -> State:
    state, times, dim = list(call.input), call.arg(1, "repeats"), call.arg(2, "dim")
    if not isinstance(times, int) or dim is None:
        call.freeze("repeats them", *state)
        return (None,) * len(call.shape)
    labels = state[dim]
    state[dim] = None if labels is None else np.repeat(labels, times)
    return tuple(state)


def pixel_unshuffle(call: Call) -> State:
    """C channels -> (C r r): each channel becomes r r."""
    state = call.input
    call.freeze("works along them", *state[-2:])
    labels = state[-3]
    times = call.arg(1, "downscale_factor") ** 2
    return (*state[:-3], None if labels is None else np.repeat(labels, times), None, None)


def regroup(call: Call) -> State:
    """Labels through a change of shape that keeps the order of elements: view, flatten, unflatten, squeeze.

    A channel can only be cut if it is a whole slice of some dimension afterwards. Merged with others it becomes many
    positions of one label. Split into several dimensions, one of them shrinks (`Labels.axis` says which) and the
    positions along the others are united, which is what a channel shuffle and the heads of attention need.
    """
    state, old, new = call.input, call.source.meta["shape"], call.shape
    sizes = call.arg(1, "size") if call.name in ("view", "reshape", "_unsafe_view") else None
    result: list[Vector | None] = [None] * len(new)
    for ins, outs in _blocks(old, new):
        labelled = [d for d in ins if state[d] is not None]
        if not labelled:
            continue
        wide = [d for d in outs if new[d] > 1]
        if not wide:
            call.freeze("merges several dimensions of them", *[state[d] for d in ins])
            continue
        # Of several, the longest can still be cut: the inputs of a kernel that is laid flat to be standardised, but
        # not its rows and columns.
        own = max(labelled, key=lambda d: old[d])
        call.freeze("merges several dimensions of them", *[state[d] for d in labelled if d != own])
        column = np.asarray(state[own]).reshape([-1 if d == own else 1 for d in ins])
        cells = np.broadcast_to(column, [old[d] for d in ins]).reshape([new[d] for d in wide])
        open_ = [sizes is not None and isinstance(sizes[d], int) and sizes[d] == -1 for d in wide]
        for d, labels in zip(wide, _divided(call, cells, wide, open_), strict=True):
            result[d] = labels
    return tuple(result)


def _divided(call: Call, cells: np.ndarray, wide: list[int], open_: list[bool]) -> list[Vector | None]:
    """Labels per new dimension: of the one along which alone they vary, else of the one that is to shrink."""
    for axis in range(cells.ndim):
        rows = np.moveaxis(cells, axis, -1).reshape(-1, cells.shape[axis])
        if (rows == rows[0]).all():
            return [rows[0] if i == axis else None for i in range(cells.ndim)]
    last = cells.ndim - 1
    likely = open_.index(True) if True in open_ else last
    key = (call.node.name, wide[0])
    if call.labels.tagging:
        fresh = [call.labels.fresh(size) for size in cells.shape]
        call.labels.splits[key] = Split(np.unique(cells), tuple(fresh), likely)
        return list(fresh)
    axis = call.labels.orders.get(key, (likely,))[0]
    rows = np.moveaxis(cells, axis, -1).reshape(-1, cells.shape[axis])
    call.labels.unite_rows(rows, call.because("meets channels that cannot be cut"))
    call.labels.splits[key] = Split(np.unique(cells), (rows[0],), axis)
    return [rows[0] if i == axis else None for i in range(cells.ndim)]


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


def reshape_like(call: Call) -> State:
    """reshape_as: the shape is another tensor's, so that dimensions which shrink shrink there, too."""
    found, like = list(regroup(call)), call.states[call.arg(1, "other")]
    for dim, (own, other) in enumerate(zip(found, like, strict=True)):
        if own is not None and other is not None:
            call.labels.unite(own, other, call.because("meets channels that cannot be cut"))
        elif own is not None or other is not None:
            call.freeze("takes the shape of a tensor whose size is fixed", own, other)
            found[dim] = None
    return tuple(found)


SHAPES: dict[Any, str] = {
    regroup: "view reshape _unsafe_view flatten unflatten squeeze", reshape_like: "reshape_as view_as",
    expand: "expand", slicing: "slice", pad: "pad constant_pad_nd",
    chunk: "chunk unsafe_chunk split unsafe_split split_with_sizes unsafe_split_with_sizes",
    created: "zeros ones full empty rand randn new_zeros new_ones new_full new_empty",
    repeat: "repeat tile", repeat_interleave: "repeat_interleave", pixel_unshuffle: "pixel_unshuffle",
}  # fmt: skip
