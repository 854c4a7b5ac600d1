"""What operators that sum up, compare, order or move things along a dimension do to channel labels.

A sum over channels stays what it was when channels of zeros go. A mean, a variance and a length over channels become
those of the channels that are left, like the statistics of a layer norm, and count as norms here; so does a maximum,
as that of attention over places (CBAM, Woo et al., arXiv:1807.06521). A softmax, an order, or the place of a maximum
depends on what was removed, so those channels stay.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tersenet.graph.labels import Call, State, Vector, nothing, unknown

# Over these the rest is as good as it was.
_FAIR = ("sum", "mean", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm")
_EXTREMES = ("max", "min", "amax", "amin")  # as are these, where only their values are read and not their places


def _schema(call: Call) -> tuple[list[str], int]:
    """Names of an operator's arguments, and how many tensors it gives."""
    schema: Any = getattr(call.node.target, "_schema")  # noqa: B009 - of an OpOverload, which is all that comes here
    return [argument.name for argument in schema.arguments], len(schema.returns)


def _dims(given: Any, rank: int) -> set[int]:
    """Dimensions that an argument names; none or an empty list is all of them."""
    if given is None or given == []:
        return set(range(rank))
    return {dim % rank for dim in (given if isinstance(given, list | tuple) else [given])}


def _reduced(call: Call, dims: set[int], keep: bool) -> State:
    state = call.input
    if keep:
        return tuple(None if dim in dims else labels for dim, labels in enumerate(state))
    return tuple(labels for dim, labels in enumerate(state) if dim not in dims)


def reduction(call: Call) -> Any:
    """Sum, mean, variance, norm, maximum and so on over some dimensions."""
    state = call.input
    names, several = _schema(call)
    given = call.arg(names.index("dim"), "dim") if "dim" in names else None
    keep = bool(call.arg(names.index("keepdim"), "keepdim", False)) if "keepdim" in names else False
    dims = _dims(given, len(state))
    power = call.arg(1, "ord", 2) if call.name in ("linalg_vector_norm", "norm") else 2
    placed = several > 1 and any(user.args[1:] != (0,) for user in call.node.users)
    fair = call.name in _FAIR or (call.name in _EXTREMES and not placed)
    if not fair or power not in (None, 1, 2):
        call.freeze("works across them", *[state[dim] for dim in dims])
    result = _reduced(call, dims, keep)
    return result if several == 1 else [result] * several


def along(call: Call) -> Any:
    """Softmax, running sums and sorting: they work along one dimension and keep its size."""
    state = call.input
    names, several = _schema(call)
    call.freeze("works across them", state[call.arg(names.index("dim"), "dim", -1)])
    return state if several == 1 else [state] * several


def topk(call: Call) -> list[State]:
    state = list(call.input)
    dim = call.arg(2, "dim", -1)
    call.freeze("chooses among them by their values", state[dim])
    state[dim] = None
    return [tuple(state), tuple(state)]


def triangle(call: Call) -> State:
    """triu and tril: zeros by the place in the last two dimensions."""
    state = call.input
    call.freeze("works across them", *state[-2:])
    return state


def roll(call: Call) -> State:
    """Rolling over channels depends on how many there are; over other dimensions nothing happens to them."""
    state = list(call.input)
    dims = call.arg(2, "dims", [])
    if not dims:
        call.freeze("rolls them", *state)
        return tuple(state)
    for dim in dims if isinstance(dims, list | tuple) else [dims]:
        call.freeze("rolls them", state[dim])
        state[dim] = None
    return tuple(state)


def stack(call: Call) -> State:
    """Tensors side by side along a new dimension: their own dimensions are the same channels."""
    nodes = list(call.source)
    dim = call.arg(1, "dim", 0) % len(call.shape)
    states = [call.states[node] for node in nodes]
    merged: list[Vector | None] = []
    for d, column in enumerate(zip(*states, strict=True)):
        size = nodes[0].meta["shape"][d]
        if all(part is None for part in column):
            merged.append(None)
            continue
        rows = np.stack([np.zeros(size, np.int64) if part is None else part for part in column])
        call.labels.unite_rows(rows, call.because("meets channels that cannot be cut"))
        merged.append(rows[0])
    return (*merged[:dim], None, *merged[dim:])


def patches(call: Call) -> State:
    """im2col: (N, C, H, W) -> (N, C K K, L); every channel becomes its K K places."""
    state = call.input
    if len(state) != 4:
        unknown(call)
        return nothing(call)
    call.freeze("works along them", *state[2:])
    times = int(np.prod(call.arg(1, "kernel_size")))
    return (state[0], None if state[1] is None else np.repeat(state[1], times), None)


def unpatches(call: Call) -> State:
    """col2im: (N, C K K, L) -> (N, C, H, W)."""
    state = call.input
    if len(state) != 3:
        unknown(call)
        return nothing(call)
    call.freeze("works along them", state[2])
    if state[1] is None:
        return nothing(call)
    rows = state[1].reshape(call.shape[1], -1).T
    call.labels.unite_rows(rows, call.because("meets channels that cannot be cut"))
    return (state[0], rows[0], None, None)


def windows(call: Call) -> State:
    """Tensor.unfold: windows over one dimension, which become a new last one."""
    state = list(call.input)
    dim = call.arg(1, "dimension")
    call.freeze("works along them", state[dim])
    state[dim] = None
    return (*state, None)


REDUCTIONS: dict[Any, str] = {
    reduction: "mean sum amax amin max min argmax argmin median prod any all var std var_mean std_mean logsumexp "
    "linalg_vector_norm norm aminmax",
    along: "softmax log_softmax _softmax _log_softmax _safe_softmax cumsum cumprod cummax sort argsort",
    topk: "topk", triangle: "triu tril", roll: "roll", stack: "stack",
    patches: "im2col", unpatches: "col2im", windows: "unfold",
}  # fmt: skip
