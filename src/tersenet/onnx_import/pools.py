"""Pools over windows and over whole maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tersenet.onnx_import.call import Call, spatial
from tersenet.onnx_import.convolutions import padded, window
from tersenet.onnx_import.registry import operator
from tersenet.onnx_import.values import Host

_MAX = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def _outputs(sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int],
             before: Sequence[int], behind: Sequence[int], ceil: bool) -> list[int]:  # fmt: skip
    """How often a window fits; with `ceil` also where it begins inside, and reaches beyond the end."""
    counts = []
    for size, each, stride, dilation, low, high in zip(sizes, kernel, strides, dilations, before, behind, strict=True):
        room = size + low + high - dilation * (each - 1) - 1
        count = (-(-room // stride) if ceil else room // stride) + 1
        if ceil and (count - 1) * stride >= size + low:
            count -= 1
        counts.append(count)
    return counts


def _beyond(call: Call, x: Tensor, kernel: Sequence[int], ceil: bool) -> tuple[list[int], ...]:
    """(strides, dilations, padding before, behind, behind with what a last window needs, outputs)."""
    strides, dilations, before, behind = window(call, kernel, x)
    sizes = spatial(x)
    outputs = _outputs(sizes, kernel, strides, dilations, before, behind, ceil)
    needed = [
        max(high, (count - 1) * stride + dilation * (each - 1) + 1 - size - low)
        for count, stride, dilation, each, size, low, high in zip(
            outputs, strides, dilations, kernel, sizes, before, behind, strict=True
        )
    ]
    return strides, dilations, before, behind, needed, outputs


@operator("MaxPool")
def max_pool(call: Call) -> Tensor:
    x, kernel = call.tensor(0), call.attribute("kernel_shape")
    call.ignore("storage_order")
    if call.uses(1):
        call.refuse("gives its indices, too, which is not supported")
    ceil = bool(call.attribute("ceil_mode", 0))
    strides, dilations, before, behind, needed, _ = _beyond(call, x, kernel, ceil)
    k = len(kernel)
    plain = before == behind and all(2 * each <= size for each, size in zip(before, kernel, strict=True))
    if not x.is_floating_point():
        call.refuse(f"takes {x.dtype}; floating point numbers are supported")
    if plain and min(before) >= 0:
        return _MAX[k - 1](x, kernel, strides, before, dilations, ceil_mode=ceil)
    return _MAX[k - 1](padded(x, before, needed, -math.inf), kernel, strides, 0, dilations)


@operator("AveragePool")
def average_pool(call: Call) -> Tensor:
    x, kernel = call.tensor(0), call.attribute("kernel_shape")
    ceil, counted = bool(call.attribute("ceil_mode", 0)), bool(call.attribute("count_include_pad", 0))
    strides, dilations, before, behind, needed, outputs = _beyond(call, x, kernel, ceil)
    k = len(kernel)
    if any(each != 1 for each in dilations):
        call.refuse(f"has dilations={dilations}; a pool without dilation is supported")
    plain = before == behind and all(2 * each <= size for each, size in zip(before, kernel, strict=True))
    if plain and min(before) >= 0:
        return _AVERAGE[k - 1](x, kernel, strides, before, ceil, counted)
    y = _AVERAGE[k - 1](padded(x, before, needed), kernel, strides)
    shares = _shares(spatial(x), kernel, strides, before, behind, outputs, counted)
    if np.all(shares == 1):
        return y
    return y * call.network.constant(call.step, Host(shares, f"{call.step.outputs[0]}/shares"))


def _shares(sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], before: Sequence[int],
            behind: Sequence[int], outputs: Sequence[int], counted: bool) -> np.ndarray:  # fmt: skip
    """(1, 1, H, W, ...) entries of a window to those of it that count."""
    shares = np.ones((1, 1), np.float64)
    for size, each, stride, low, high, count in zip(sizes, kernel, strides, before, behind, outputs, strict=True):
        starts = np.arange(count) * stride
        first, end = (0, low + size + high) if counted else (low, low + size)
        counts = np.minimum(starts + each, end) - np.maximum(starts, first)
        shares = shares[..., None] * (each / counts)
    return shares.astype(np.float32)


@operator("LpPool")
def lp_pool(call: Call) -> Tensor:
    x, kernel, p = call.tensor(0), call.attribute("kernel_shape"), call.attribute("p", 2)
    strides, dilations, before, _, needed, _ = _beyond(call, x, kernel, bool(call.attribute("ceil_mode", 0)))
    if any(each != 1 for each in dilations):
        call.refuse(f"has dilations={dilations}; a pool without dilation is supported")
    powers = padded(x.abs().pow(p), before, needed)
    total = _AVERAGE[len(kernel) - 1](powers, kernel, strides) * math.prod(kernel)
    return total.pow(1 / p)


@operator("GlobalAveragePool")
def global_average_pool(call: Call) -> Tensor:
    x = call.tensor(0)
    return F.adaptive_avg_pool2d(x, 1) if x.dim() == 4 else x.mean(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(call: Call) -> Tensor:
    x = call.tensor(0)
    return torch.amax(x, tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalLpPool")
def global_lp_pool(call: Call) -> Tensor:
    x, p = call.tensor(0), call.attribute("p", 2)
    return x.abs().pow(p).sum(tuple(range(2, x.dim())), keepdim=True).pow(1 / p)
