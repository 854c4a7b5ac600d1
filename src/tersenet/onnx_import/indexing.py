"""Entries by their places: gathering, scattering, the largest, sums up to a place."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tersenet.onnx_import.call import Call
from tersenet.onnx_import.registry import operator
from tersenet.onnx_import.values import Host, scalar


@operator("Gather")
def gather(call: Call) -> Tensor:
    x, axis = call.tensor(0), call.attribute("axis", 0)
    axis = axis % x.dim()
    known = call.values[1]
    if isinstance(known, Host):
        return _at_known(call, x, known, axis)
    places = call.tensor(1)
    table = axis == 0 and call.constant(0) is not None and x.dim() == 2 and x.is_floating_point()
    if table and call.step.inputs[1] in call.network.inputs_by_order:
        return F.embedding(places, x)
    flat = _not_negative(places, x.shape[axis]).reshape(-1)
    entries = x.index_select(axis, flat)
    return entries.reshape([*x.shape[:axis], *places.shape, *x.shape[axis + 1 :]])


def _at_known(call: Call, x: Tensor, places: Host, axis: int) -> Tensor:
    array = places.array
    if array.ndim == 0:
        return x.select(axis, scalar(array))
    if places.symbolic:
        call.refuse("gathers at places that hang on the batch, which is not supported")
    flat = (
        np.where(array < 0, array + int(x.shape[axis]), array).reshape(-1) if (array < 0).any() else array.reshape(-1)
    )
    steps = np.unique(np.diff(flat))
    if array.ndim == 1 and len(flat) and len(steps) <= 1 and (not len(steps) or steps[0] > 0):
        step = int(steps[0]) if len(steps) else 1
        where = [slice(None)] * axis + [slice(int(flat[0]), int(flat[-1]) + 1, step)]
        return x[tuple(where)]
    index = call.network.constant(call.step, Host(flat.astype(np.int64), f"{call.step.outputs[0]}/places"))
    entries = x.index_select(axis, index)
    return entries if array.ndim == 1 else entries.reshape([*x.shape[:axis], *array.shape, *x.shape[axis + 1 :]])


def _not_negative(places: Tensor, size: Any) -> Tensor:
    places = places.long()
    return torch.where(places < 0, places + size, places)


@operator("GatherElements")
def gather_elements(call: Call) -> Tensor:
    x, places = call.tensor(0), call.tensor(1)
    axis = call.attribute("axis", 0) % x.dim()
    return x.gather(axis, _not_negative(places, x.shape[axis]))


@operator("GatherND")
def gather_nd(call: Call) -> Tensor:
    x, places, batch = call.tensor(0), call.tensor(1), call.attribute("batch_dims", 0)
    own = []
    for axis in range(batch):
        shape = [1] * (places.dim() - 1)
        shape[axis] = x.shape[axis]
        own.append(torch.arange(x.shape[axis]).reshape(shape))
    parts = [_not_negative(each, x.shape[batch + i]) for i, each in enumerate(places.unbind(-1))]
    return x[tuple(own + parts)]


@operator("ScatterElements", "Scatter")
def scatter_elements(call: Call) -> Tensor:
    x, places, updates = call.tensor(0), call.tensor(1), call.tensor(2)
    axis = call.attribute("axis", 0) % x.dim()
    places = _not_negative(places, x.shape[axis])
    kind = call.one_of("reduction", ("none", "add", "mul", "min", "max"), "none")
    if kind == "none":
        return x.scatter(axis, places, updates)
    reduce = {"add": "sum", "mul": "prod", "min": "amin", "max": "amax"}[kind]
    return x.scatter_reduce(axis, places, updates, reduce)


@operator("ScatterND")
def scatter_nd(call: Call) -> Tensor:
    x, places, updates = call.tensor(0), call.tensor(1), call.tensor(2)
    kind = call.one_of("reduction", ("none", "add"), "none")
    parts = tuple(_not_negative(each, x.shape[i]) for i, each in enumerate(places.unbind(-1)))
    return x.index_put(parts, updates, accumulate=kind == "add")


@operator("OneHot")
def one_hot(call: Call) -> Tensor:
    places, values = call.tensor(0), call.tensor(2)
    depth = int(call.ints(1, "depth")[0])
    axis = call.attribute("axis", -1)
    axis = axis + places.dim() + 1 if axis < 0 else axis
    shape = [1] * (places.dim() + 1)
    shape[axis] = depth
    classes = torch.arange(depth).reshape(shape)
    asked = _not_negative(places, depth).unsqueeze(axis)
    return torch.where(asked == classes, values[1], values[0])


@operator("TopK")
def top_k(call: Call) -> tuple[Tensor, Tensor]:
    k = call.attribute("k") or int(call.ints(1, "number")[0])
    x, axis = call.tensor(0), call.attribute("axis", -1)
    largest, ordered = bool(call.attribute("largest", 1)), bool(call.attribute("sorted", 1))
    entries = torch.topk(x, k, axis, largest, ordered)
    return entries.values, entries.indices


@operator("ArgMax", "ArgMin")
def extreme_place(call: Call) -> Tensor:
    x, axis = call.tensor(0), call.attribute("axis", 0)
    keep = bool(call.attribute("keepdims", 1))
    function = torch.argmax if call.step.op == "ArgMax" else torch.argmin
    if not call.attribute("select_last_index", 0):
        return function(x, axis, keep)
    return x.shape[axis] - 1 - function(x.flip(axis), axis, keep)


@operator("CumSum")
def running_sum(call: Call) -> Tensor:
    x, axis = call.tensor(0), int(call.ints(1, "axis")[0])
    back = bool(call.attribute("reverse", 0))
    x = x.flip(axis) if back else x
    total = torch.cumsum(x, axis, dtype=x.dtype)
    if call.attribute("exclusive", 0):
        total = total - x
    return total.flip(axis) if back else total
