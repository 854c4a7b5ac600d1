"""Parts of tensors: slices and paddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tersenet.onnx_import.call import Call
from tersenet.onnx_import.registry import operator

_MODES = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@operator("Slice")
def cut(call: Call) -> Tensor:
    x = call.tensor(0)
    if call.attribute("starts") is not None:
        starts, ends = list(call.attribute("starts")), list(call.attribute("ends"))
        axes, steps = list(call.attribute("axes") or range(len(starts))), [1] * len(starts)
    else:
        starts, ends = call.ints(1, "starts"), call.ints(2, "ends")
        axes = call.ints(3, "axes") if call.has(3) else list(range(len(starts)))
        steps = call.ints(4, "steps") if call.has(4) else [1] * len(starts)
    where = [slice(None)] * x.dim()
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step > 0:
            where[axis] = slice(start, end, step)
            continue
        size = int(x.shape[axis])
        places = range(size)[slice(start, None if end < -size else end, step)]
        x = x.flip(axis)
        where[axis] = slice(size - 1 - places.start, size - 1 - places.stop, -step) if places else slice(0, 0)
    return x[tuple(where)]


@operator("Pad")
def pad(call: Call) -> Tensor:
    x, mode = call.tensor(0), call.one_of("mode", ("constant", *_MODES), "constant")
    amounts = call.attribute("pads") or call.ints(1, "paddings")
    value = call.attribute("value", 0.0)
    if call.has(2):
        value = call.operand(2, 1)
        if isinstance(value, Tensor):
            call.refuse("computes its value from a tensor; a constant is supported")
    axes = [axis % x.dim() for axis in call.ints(3, "axes")] if call.has(3) else list(range(x.dim()))
    before: list[Any] = [0] * x.dim()
    behind: list[Any] = [0] * x.dim()
    for i, axis in enumerate(axes):
        before[axis], behind[axis] = amounts[i], amounts[i + len(axes)]
    first = next((i for i in range(x.dim()) if before[i] or behind[i]), None)
    if first is None:
        return x
    flat = [each for i in reversed(range(first, x.dim())) for each in (before[i], behind[i])]
    if mode == "constant":
        return F.pad(x, flat, value=value)
    return _by_contents(call, x, flat, x.dim() - first, _MODES[mode])


def _by_contents(call: Call, x: Tensor, amounts: list[Any], count: int, mode: str) -> Tensor:
    """What lies at the ends is repeated: torch does so for up to three dimensions behind two others."""
    if count > 3 or min(amounts) < 0:
        call.refuse("repeats contents over more than three dimensions, or cuts off, which is not supported")
    rank = x.dim()
    if rank > count + 2:
        call.refuse(f"repeats contents of {count} of {rank} dimensions; up to {count + 2} dimensions are supported")
    for _ in range(count + 2 - rank):
        x = x.unsqueeze(0)
    x = F.pad(x, amounts, mode=mode)
    for _ in range(count + 2 - rank):
        x = x.squeeze(0)
    return x


@operator("Unique", "Compress", "NonZero", "NonMaxSuppression")
def of_values(call: Call) -> torch.Tensor:
    call.refuse(
        "gives outputs whose size depends on values, which a compressed model cannot have; export the model without "
        "what follows its network (boxes, suppression)"
    )
