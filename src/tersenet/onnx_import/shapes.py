"""Operators that change shapes, and nothing else.

A file with a fixed batch has it among the numbers of a Reshape. There the batch of the input is followed to its place
in the output (`rescaled`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersenet.onnx_import.call import Call
from tersenet.onnx_import.registry import operator
from tersenet.onnx_import.values import DTYPES, Host, objects


def batch_axis(x: Tensor, recorded: tuple[int, ...] | None) -> int | None:
    """The dimension that differs from what it was with the file's own batch; None where none does."""
    if recorded is None:
        return None
    return next((i for i, (now, then) in enumerate(zip(x.shape, recorded, strict=True)) if not _same(now, then)), None)


def _same(now: Any, then: int) -> bool:
    return isinstance(now, int) and now == then


def rescaled(x: Tensor, recorded: tuple[int, ...], output: tuple[int, ...]) -> list[int]:
    """The target of a Reshape for another batch: the dimension that begins where the batch began is left open."""
    axis = batch_axis(x, recorded)
    assert axis is not None
    leading = math.prod(recorded[:axis])
    for place in range(len(output)):
        if math.prod(output[:place]) == leading:
            return [*output[:place], -1, *output[place + 1 :]]
    return list(output)


@operator("Reshape")
def reshape(call: Call) -> Tensor:
    x, target = call.tensor(0), call.ints(1, "shape")
    recorded, output = call.recorded_shape(0), call.recorded_output_shape()
    plain = all(isinstance(size, int) for size in target)
    if (
        plain
        and recorded is not None
        and output is not None
        and 0 not in output
        and batch_axis(x, recorded) is not None
    ):
        return x.reshape(rescaled(x, recorded, output))
    if not call.attribute("allowzero", 0):
        target = [x.shape[i] if isinstance(size, int) and size == 0 else size for i, size in enumerate(target)]
    return x.reshape(target)


@operator("Flatten")
def flatten(call: Call) -> Tensor:
    x, axis = call.tensor(0), call.attribute("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 1 and x.dim() > 1:
        return x.flatten(1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Transpose")
def transpose(call: Call) -> Tensor:
    x = call.tensor(0)
    return x.permute(call.attribute("perm") or list(range(x.dim()))[::-1])


@operator("Squeeze")
def squeeze(call: Call) -> Tensor:
    x, axes = call.tensor(0), call.axes(1)
    if axes is None:
        axes = [i for i, size in enumerate(x.shape) if isinstance(size, int) and size == 1]
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        if not _same(x.shape[axis], 1):
            call.refuse(f"removes dimension {axis}, which is {x.shape[axis]} and not 1")
        x = x.squeeze(axis)
    return x


@operator("Unsqueeze")
def unsqueeze(call: Call) -> Tensor:
    x, axes = call.tensor(0), call.axes(1) or []
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Shape")
def shape(call: Call) -> Host:
    x = call.tensor(0)
    sizes = list(x.shape)[call.attribute("start", 0) : call.attribute("end")]
    return Host(objects(sizes), call.step.outputs[0])


@operator("Size")
def size(call: Call) -> Host:
    return Host(objects([math.prod(call.tensor(0).shape)]).reshape(()), call.step.outputs[0])


@operator("Expand")
def expand(call: Call) -> Tensor:
    x, target = call.tensor(0), call.ints(1, "shape")
    sizes = [1] * (len(target) - x.dim()) + list(x.shape)
    target = [1] * (len(sizes) - len(target)) + target
    axis = batch_axis(x, call.recorded_shape(0))
    held = None if axis is None else axis + len(sizes) - x.dim()
    return x.expand(
        [
            own if _same(asked, 1) or i == held else asked
            for i, (own, asked) in enumerate(zip(sizes, target, strict=True))
        ]
    )


@operator("Tile")
def tile(call: Call) -> Tensor:
    return call.tensor(0).repeat(call.ints(1, "repeats"))


@operator("Concat")
def concat(call: Call) -> Tensor:
    tensors = [call.tensor(i) for i in range(len(call.values))]
    axis = call.attribute("axis") % tensors[0].dim()
    places = [batch_axis(x, call.recorded_shape(i)) for i, x in enumerate(tensors)]
    moved = next((i for i, place in enumerate(places) if place not in (None, axis)), None)
    if moved is not None:  # others may be constants that are stored for the file's own batch
        like, batch = tensors[moved], places[moved]
        assert batch is not None
        tensors = [
            x if place is not None else _for_batch(call, x, batch, like)
            for x, place in zip(tensors, places, strict=True)
        ]
    return torch.cat(tensors, axis)


def _for_batch(call: Call, x: Tensor, place: int, other: Tensor) -> Tensor:
    """A constant that was stored for a batch of 1, for that of another tensor."""
    if not _same(x.shape[place], 1):
        call.refuse("joins a constant that is stored for a batch of its own; export the model with an open batch")
    return x.expand([other.shape[place] if i == place else size for i, size in enumerate(x.shape)])


@operator("Split")
def split(call: Call) -> tuple[Tensor, ...]:
    x, axis, count = call.tensor(0), call.attribute("axis", 0), len(call.step.outputs)
    call.ignore("num_outputs")
    sizes = call.attribute("split") or (call.ints(1, "sizes") if call.has(1) else None)
    if sizes is None:
        return torch.split(x, -(-x.shape[axis] // count), axis)
    return torch.split(x, list(sizes), axis)


@operator("DepthToSpace")
def depth_to_space(call: Call) -> Tensor:
    x, block = call.tensor(0), call.attribute("blocksize")
    if call.one_of("mode", ("DCR", "CRD"), "DCR") == "CRD":
        return torch.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    parts = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // block**2, h * block, w * block)


@operator("SpaceToDepth")
def space_to_depth(call: Call) -> Tensor:
    x, block = call.tensor(0), call.attribute("blocksize")
    n, c, h, w = x.shape
    if call.one_of("mode", ("DCR", "CRD"), "DCR") == "CRD":
        return torch.pixel_unshuffle(x, block)
    parts = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * block**2, h // block, w // block)


@operator("ConstantOfShape")
def constant_of_shape(call: Call) -> Tensor:
    value = call.attribute("value")
    filled = torch.zeros(1) if value is None else torch.from_numpy(np.asarray(value).reshape(-1))
    return torch.full(call.ints(0, "shape"), filled.item(), dtype=filled.dtype)


@operator("Range")
def value_range(call: Call) -> Tensor:
    start, end, step = (call.ints(i, "limits")[0] for i in range(3))
    return torch.arange(start, end, step)


@operator("EyeLike")
def eye_like(call: Call) -> Tensor:
    x, k = call.tensor(0), call.attribute("k", 0)
    dtype = DTYPES[call.attribute("dtype")] if call.attribute("dtype") is not None else x.dtype
    ones = torch.ones(x.shape, dtype=torch.float32)
    return torch.tril(torch.triu(ones, k), k).to(dtype)


@operator("Trilu")
def triangle(call: Call) -> Tensor:
    k = call.ints(1, "diagonal")[0] if call.has(1) else 0
    function = torch.triu if call.attribute("upper", 1) else torch.tril
    return function(call.tensor(0), k)
