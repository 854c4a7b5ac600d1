"""Sums, means and extremes over axes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tersenet.onnx_import.call import Call
from tersenet.onnx_import.registry import HANDLERS

_Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


_KINDS: dict[str, _Reduction] = {
    "ReduceSum": lambda x, axes, keep: torch.sum(x, axes, keep, dtype=x.dtype),
    "ReduceMean": lambda x, axes, keep: torch.mean(x, axes, keep),
    "ReduceMax": lambda x, axes, keep: torch.amax(x, axes, keep),
    "ReduceMin": lambda x, axes, keep: torch.amin(x, axes, keep),
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: torch.sum(x.abs(), axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.sqrt(torch.sum(x * x, axes, keep)),
    "ReduceSumSquare": lambda x, axes, keep: torch.sum(x * x, axes, keep),
    "ReduceLogSum": lambda x, axes, keep: torch.log(torch.sum(x, axes, keep)),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
}


def _reduce(call: Call) -> Tensor:
    x, axes = call.tensor(0), call.axes(1)
    keep, unchanged = bool(call.attribute("keepdims", 1)), bool(call.attribute("noop_with_empty_axes", 0))
    if not axes:
        axes = [] if unchanged else list(range(x.dim()))
    if not axes:
        if unchanged and call.step.op not in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"):
            call.refuse("reduces no axis, which is supported for sums, means, products and extremes")
        return x
    return _KINDS[call.step.op](x, [axis % x.dim() for axis in axes], keep)


HANDLERS.update(dict.fromkeys(_KINDS, _reduce))
