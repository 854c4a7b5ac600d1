"""What each layer does to channel labels: by its axes (graph/surgery.py) where it can be cut, else by its type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from tersenet.bricks.brick import Brick
from tersenet.graph.coupling_rules import pixel_shuffle, same, spatial
from tersenet.graph.coupling_shapes import regroup
from tersenet.graph.labels import Call, State, nothing, unknown
from tersenet.graph.surgery import axes


def layer(call: Call, module: Any, path: str) -> Any:
    """The labels after a layer: by its axes where it can be cut, else by its type."""
    state = call.input
    known = axes(module)
    why = call.because("is called on channels that cannot be cut")
    if "out" in known:
        dim = len(state) - 1 if hasattr(module, "in_features") else 1
        into = call.labels.slot(path, "in", state[dim], known["in"].size, why)
        out = call.labels.slot(path, "out", call.labels.fresh(known["out"].size), known["out"].size, why)
        for vector, axis in ((into, known["in"]), (out, known["out"])):
            call.labels.unite_rows(vector.reshape(axis.groups, -1), why)
        call.freeze("moves over them", *[v for d, v in enumerate(state) if d not in (0, dim)] if dim == 1 else [])
        return tuple(out if d == dim else v if dim > 1 or d == 0 else None for d, v in enumerate(state))
    if "channel" in known and not (isinstance(module, nn.PReLU) and module.num_parameters == 1):
        dim = len(state) - 1 if hasattr(module, "normalized_shape") else 1
        axis = known["channel"]
        labels = call.labels.slot(path, "channel", state[dim], axis.size, why)
        call.labels.unite_rows(labels.reshape(axis.groups, -1), why)
        times = module.out_channels // axis.size if isinstance(getattr(module, "out_channels", None), int) else 1
        if hasattr(module, "kernel_size"):
            call.freeze("moves over them", *state[dim + 1 :])
            state = (*state[: dim + 1], *[None] * len(state[dim + 1 :]))
        if state[dim] is None:
            return state
        return tuple(np.repeat(labels, times) if d == dim else v for d, v in enumerate(state))
    if "pad" in known:
        zeros = call.labels.fresh(known["pad"].size)
        labels = np.zeros(call.source.meta["shape"][1], np.int64) if state[1] is None else state[1]
        call.labels.slot(path, "pad", zeros, len(zeros), why)
        before = module.before
        return (state[0], np.concatenate([zeros[:before], labels, zeros[before:]]), *state[2:])
    for kinds, rule in LAYERS:
        if isinstance(module, kinds):
            return rule(call, module)
    if isinstance(module, Brick) and all(tensor.numel() == 1 for tensor in module.state_dict().values()):
        return same(call)  # a quantizer: it has no numbers per channel, and its shapes are tried like all others
    unknown(call)
    return nothing(call)


def _softmax_layer(call: Call, module: nn.Module) -> State:
    state = call.input
    dim = getattr(module, "dim", None)
    call.freeze("works across them", *(state if dim is None else [state[dim]]))
    return state


def _flatten_layer(call: Call, module: nn.Module) -> State:
    return regroup(call)


def _shuffle_layer(call: Call, module: Any) -> State:
    """(G, K) channels -> (K, G): the groups lose the same places."""
    state = call.input
    if state[1] is None:
        return state
    rows = state[1].reshape(module.groups, -1)
    call.labels.unite_rows(rows, call.because("meets channels that cannot be cut"))
    return (state[0], rows.T.reshape(-1), *state[2:])


_A = nn.modules.activation
_ALONE = (
    _A.ReLU, _A.ReLU6, _A.LeakyReLU, _A.ELU, _A.SELU, _A.CELU, _A.GELU, _A.SiLU, _A.Mish, _A.Hardswish, _A.Hardsigmoid,
    _A.Hardtanh, _A.Sigmoid, _A.Tanh, _A.Softplus, _A.Softsign, _A.Tanhshrink, _A.Threshold, _A.LogSigmoid, _A.RReLU,
    _A.Hardshrink, _A.Softshrink, _A.PReLU, nn.Identity, nn.modules.dropout._DropoutNd,
)  # fmt: skip
_MOVING = (
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd, nn.modules.pooling._LPPoolNd, nn.Upsample,
    nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd,
)  # fmt: skip

LAYERS: list[tuple[Any, Callable[[Call, Any], State]]] = [
    (_ALONE, lambda call, module: same(call)),
    (_MOVING, lambda call, module: spatial(call) if len(call.shape) == _rank(module) else _refuse(call)),
    ((nn.Softmax, nn.LogSoftmax, nn.Softmin), _softmax_layer),
    ((nn.Flatten,), _flatten_layer),
    ((nn.ChannelShuffle,), _shuffle_layer),
    ((nn.PixelShuffle,), lambda call, module: pixel_shuffle(call)),
]


def _rank(module: nn.Module) -> int:
    """Rank of a batched input, from the digit in the layer's name; resizing has none and takes any."""
    digits = [int(letter) for letter in type(module).__name__ if letter.isdigit()]
    return digits[-1] + 2 if digits else 4


def _refuse(call: Call) -> State:
    unknown(call)
    return nothing(call)
