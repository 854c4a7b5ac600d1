"""Operators that torch's ONNX exporter or a runtime gets wrong, written as others that they get right.

Found by exporting each operator with each of its settings and comparing (`tersenet.deploy.verify`):
- The exporter drops the `divisor_override` of an average pool, and refuses an adaptive maximum pool.
- With `ceil_mode`, PyTorch leaves out a last window that would begin in the padding; ONNX counts it.
- ONNX Runtime's integer AveragePool divides a window that reaches over the edge by the whole kernel.
Each becomes what its definition says: zeros around, a plain pool, and a factor per window. All of it is exact up to
the order of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn import functional as F

aten = torch.ops.aten


def decompose(program: ExportedProgram) -> ExportedProgram:
    """The same program without the operators that come out wrong."""
    if not any(node.target in TABLE for node in program.graph.nodes):
        return program
    return program.run_decompositions(dict(TABLE))


def _filled(value: int | Sequence[int] | None, dims: int, default: Sequence[int]) -> list[int]:
    """An argument of a pool, which may be one number, per axis."""
    if value is None or (isinstance(value, list | tuple) and not value):
        return list(default)
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * dims if len(numbers) == 1 else numbers


def _floored(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """How many windows there are that end before the padding does."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _ceiled(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """PyTorch's number of windows with `ceil_mode`: the last one may reach beyond, and begins before the padding."""
    count = -((dilation * (kernel - 1) + 1 - size - 2 * padding) // stride) + 1
    return count - 1 if (count - 1) * stride >= size + padding else count


def _average(dims: int, pool: Any) -> Callable[..., Any]:
    def decomposition(
        x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> Any:  # fmt: skip
        kernel = _filled(kernel_size, dims, ())
        steps, around = _filled(stride, dims, kernel), _filled(padding, dims, [0] * dims)
        if not ceil_mode and divisor_override is None:
            return NotImplemented
        sizes = [int(size) for size in x.shape[-dims:]]
        axes = list(zip(sizes, kernel, steps, around, strict=True))
        counts = [_ceiled(*axis) if ceil_mode else _floored(*axis) for axis in axes]
        if divisor_override is None and counts == [_floored(*axis) for axis in axes]:
            return pool(x, kernel, steps, around, False, count_include_pad)
        pads = []  # from the last axis to the first
        for (size, k, s, p), count in reversed(list(zip(axes, counts, strict=True))):
            pads += [p, max(0, (count - 1) * s + k - size - p)]
        summed = pool(F.pad(x, pads), kernel, steps)
        whole = torch.tensor(kernel).prod().item()
        if divisor_override is not None:
            return summed * (whole / divisor_override)
        factor = torch.ones(())
        for axis, count in zip(axes, counts, strict=True):
            factor = factor[..., None] * axis[1] / torch.tensor(_window_sizes(*axis, count, count_include_pad))
        return summed * factor.to(x)

    return decomposition


def _window_sizes(size: int, kernel: int, stride: int, padding: int, count: int, with_padding: bool) -> list[float]:
    """What PyTorch divides each window along an axis by."""
    found = []
    for i in range(count):
        start = i * stride - padding
        end = min(start + kernel, size + padding)
        found.append(float(end - start if with_padding else min(end, size) - max(start, 0)))
    return found


def _maximum(dims: int, pool: Any) -> Callable[..., Any]:
    def decomposition(
        x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
    ) -> Any:
        kernel = _filled(kernel_size, dims, ())
        steps, around = _filled(stride, dims, kernel), _filled(padding, dims, [0] * dims)
        apart = _filled(dilation, dims, [1] * dims)
        axes = list(zip(x.shape[-dims:], kernel, steps, around, apart, strict=True))
        if not ceil_mode or any(_ceiled(*axis) != _floored(*axis) for axis in axes):
            return NotImplemented  # windows that begin inside count alike in PyTorch and in ONNX
        return pool(x, kernel, steps, around, apart, False)

    return decomposition


def _adaptive_maximum(dims: int) -> Callable[..., Any]:
    def decomposition(x: Tensor, output_size: Sequence[int]) -> Any:
        """Along one axis after another, window i from floor(i * size / n) to ceil((i + 1) * size / n)."""
        values = x
        for axis, count in enumerate(_filled(output_size, dims, ()), start=-dims):
            size = int(values.shape[axis])
            ends = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
            parts = [values.narrow(axis, start, end - start).amax(axis, keepdim=True) for start, end in ends]
            values = torch.cat(parts, axis) if count > 1 else parts[0]
        return values, torch.zeros_like(values, dtype=torch.int64)

    return decomposition


TABLE: dict[Any, Callable[..., Any]] = {
    aten.avg_pool1d.default: _average(1, F.avg_pool1d),
    aten.avg_pool2d.default: _average(2, F.avg_pool2d),
    aten.avg_pool3d.default: _average(3, F.avg_pool3d),
    aten.max_pool1d.default: _maximum(1, aten.max_pool1d),
    aten.max_pool2d.default: _maximum(2, aten.max_pool2d),
    aten.max_pool3d.default: _maximum(3, aten.max_pool3d),
}
