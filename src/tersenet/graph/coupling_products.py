"""What operators that multiply tensors with each other do to channel labels: products, attention, bare layers.

Bare layers are linear, convolution and norm operators whose weights are parameters of the forward itself, or are
computed in it. Dimensions over which a product is repeated are heads of attention: `Labels.heads` collects them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tersenet.graph.labels import Call, State, Vector, nothing, unknown


def _meet(call: Call, *dims: Vector | None) -> Vector | None:
    """One dimension of several tensors: the same channels. Where one of them is fixed, all are."""
    labelled = [labels for labels in dims if labels is not None]
    if len(labelled) < len(dims):
        call.freeze("meets a tensor whose size is fixed", *labelled)
        return None
    for other in labelled[1:]:
        call.labels.unite(labelled[0], other, call.because("meets channels that cannot be cut"))
    return labelled[0] if labelled else None


def _repeated(call: Call, operands: list[tuple[State, tuple[int, ...]]], count: int) -> list[Vector | None]:
    """Labels of the dimensions over which a product is repeated, aligned from the right; sizes of 1 are stretched."""
    found: list[Vector | None] = []
    for back in range(count, 0, -1):
        dims = [(state[-back], size[-back]) for state, size in operands if len(size) >= back]
        stretched = max((size for _, size in dims), default=1) > 1
        labels = _meet(call, *[vector for vector, size in dims if not (stretched and size == 1)])
        if labels is not None:
            call.labels.heads.append(labels)
        found.append(labels)
    return found


def _operand(call: Call, node: Any) -> tuple[State, tuple[int, ...]]:
    return call.states[node], node.meta["shape"]


def matmul(call: Call) -> State:
    a, b = call.node.args[1:3] if call.name == "baddbmm" else call.node.args[:2]
    (left, a_size), (right, b_size) = _operand(call, a), _operand(call, b)
    if len(left) < 2 or len(right) < 2:
        unknown(call)
        return nothing(call)
    _meet(call, left[-1], right[-2])
    front = [(left[:-2], a_size[:-2]), (right[:-2], b_size[:-2])]
    return (*_repeated(call, front, len(call.shape) - 2), left[-2], right[-1])


def attention(call: Call) -> State:
    """scaled_dot_product_attention: queries (..., T, D), keys (..., S, D), values (..., S, V)."""
    (q, q_size), (k, k_size), (v, v_size) = (_operand(call, node) for node in call.node.args[:3])
    mask = call.arg(3, "attn_mask")
    _meet(call, q[-1], k[-1])
    call.freeze("works across them", k[-2], v[-2])
    front = [(q[:-2], q_size[:-2]), (k[:-2], k_size[:-2]), (v[:-2], v_size[:-2])]
    if call.arg(6, "enable_gqa", False) and q_size[-3] != k_size[-3]:
        times = q_size[-3] // k_size[-3]
        front[1:] = [
            (
                (*part[:-1], None if part[-1] is None else np.repeat(part[-1], times)),
                (*size[:-1], q_size[-3]),
            )
            for part, size in front[1:]
        ]
    if mask is not None:
        bias, size = _operand(call, mask)
        front.append((bias[:-2], size[:-2]))
        if len(bias) > 1:
            call.freeze("works across them", bias[-1], bias[-2])
    return (*_repeated(call, front, len(call.shape) - 2), q[-2], v[-1])


def einsum(call: Call) -> State:
    equation, nodes = str(call.node.args[0]).replace(" ", ""), call.node.args[1]
    if "..." in equation or "->" not in equation:
        unknown(call)
        return nothing(call)
    left, right = equation.split("->")
    terms = left.split(",")
    found: dict[str, Vector | None] = {}
    for letter in dict.fromkeys(left.replace(",", "")):
        own = [call.states[n][term.index(letter)] for n, term in zip(nodes, terms, strict=True) if letter in term]  # type: ignore[arg-type]
        found[letter] = _meet(call, *own)
        if letter in right and len(own) > 1 and found[letter] is not None:
            call.labels.heads.append(found[letter])  # type: ignore[arg-type]
    return tuple(found[letter] for letter in right)


def linear(call: Call) -> State:
    state = call.input
    weight, _ = _operand(call, call.node.args[1])
    bias = call.arg(2, "bias")
    _meet(call, state[-1], weight[1])
    out = weight[0] if bias is None else _meet(call, weight[0], call.states[bias][0])
    return (*state[:-1], out)


def convolution(call: Call) -> State:
    """A convolution whose weight (O, I / groups, ...) is no layer's."""
    state = call.input
    (weight, size), bias, groups = _operand(call, call.node.args[1]), call.arg(2, "bias"), call.arg(6, "groups", 1)
    if not isinstance(groups, int):  # one kernel for each image: the batch lies among the channels
        unknown(call)
        return nothing(call)
    call.freeze("moves over them", *state[2:], *weight[2:])
    inputs = call.source.meta["shape"][1]
    why = call.because("meets channels that cannot be cut")
    out = weight[0]
    if 1 < groups == inputs:
        times = size[0] // groups
        out = _meet(call, out, None if state[1] is None else np.repeat(state[1], times))
    else:
        into = state[1]
        if groups > 1:
            for labels in (into, out):
                if labels is not None:
                    call.labels.unite_rows(labels.reshape(groups, -1), why)
            into = None if into is None else into[: inputs // groups]
        _meet(call, into, weight[1])
    if bias is not None:
        out = _meet(call, out, call.states[bias][0])
    return (state[0], out, *[None] * (len(call.shape) - 2))


def norm_behind(call: Call) -> State:
    """layer_norm and rms_norm over the last dimensions."""
    state = call.input
    count = len(call.arg(1, "normalized_shape"))
    tensors = [call.states[node] for node in call.node.all_input_nodes[1:]]
    last = [_meet(call, state[d - count], *[tensor[d] for tensor in tensors]) for d in range(count)]
    return (*state[:-count], *last)


def norm_each(call: Call) -> State:
    """batch_norm and instance_norm: one number per channel in every other argument."""
    state = call.input
    return (state[0], _meet(call, state[1], *[call.states[n][0] for n in call.node.all_input_nodes[1:]]), *state[2:])


def norm_groups(call: Call) -> State:
    state = call.input
    labels = _meet(call, state[1], *[call.states[n][0] for n in call.node.all_input_nodes[1:]])
    groups = call.arg(1, "num_groups")
    if labels is not None and 1 < groups < len(labels):
        call.labels.unite_rows(labels.reshape(groups, -1), call.because("meets channels that cannot be cut"))
    return (state[0], labels, *state[2:])


def prelu(call: Call) -> State:
    state = call.input
    weight, size = _operand(call, call.node.args[1])
    return state if size == (1,) else (state[0], _meet(call, state[1], weight[0]), *state[2:])


def glu(call: Call) -> State:
    state = list(call.input)
    dim = call.arg(1, "dim", -1)
    labels = state[dim]
    if labels is not None:
        rows = labels.reshape(2, -1)
        call.labels.unite_rows(rows, call.because("meets channels that cannot be cut"))
        state[dim] = rows[0]
    return tuple(state)


def unbind(call: Call) -> list[State]:
    state, dim = list(call.input), call.arg(1, "dim", 0)
    count = call.source.meta["shape"][dim]
    call.freeze("takes them one by one", state[dim])
    del state[dim]
    return [tuple(state)] * count


def index(call: Call) -> State:
    """tensor[..., numbers, ...]: what is looked up stays, the other dimensions pass."""
    state, indices = call.input, call.arg(1, "indices")
    places = [d for d, one in enumerate(indices) if one is not None]
    call.freeze("looks them up", *[state[d] for d in places])
    rank = max(len(indices[d].meta["shape"]) for d in places)
    rest = [labels for d, labels in enumerate(state) if d not in places]
    if any(str(indices[d].meta.get("dtype")) in ("torch.bool", "torch.uint8") for d in places):
        call.freeze("chooses among them by their values", *rest)
        return nothing(call)
    at = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    return (*rest[:at], *[None] * rank, *rest[at:])


def index_select(call: Call) -> State:
    state, dim = list(call.input), call.arg(1, "dim")
    call.freeze("looks them up", state[dim])
    state[dim] = None
    return tuple(state)


def embedding(call: Call) -> State:
    table = call.input
    call.freeze("looks them up", table[0])
    return (*[None] * (len(call.shape) - 1), table[1])


PRODUCTS: dict[Any, str] = {
    matmul: "matmul bmm mm", attention: "scaled_dot_product_attention", einsum: "einsum", linear: "linear",
    convolution: "conv1d conv2d conv3d", norm_behind: "layer_norm rms_norm", norm_each: "batch_norm instance_norm",
    norm_groups: "group_norm", prelu: "prelu", glu: "glu", unbind: "unbind", index: "index",
    index_select: "index_select", embedding: "embedding",
}  # fmt: skip
