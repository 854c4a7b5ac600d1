"""Operators that torch's ONNX exporter or a runtime gets wrong, written as others that they get right.

Found by exporting each operator with each of its settings and comparing (`tersenet.deploy.verify`):
- The exporter drops the `divisor_override` of an average pool, and refuses adaptive pools whose windows differ.
- Resize with antialiasing takes another scale than the one given, and OpenVINO does not know it.
- OpenVINO refuses the circular mode of Pad.
- With `ceil_mode`, PyTorch leaves out a last window that would begin in the padding; ONNX counts it.
- The exporter refuses attention of other than four dimensions, such as that of one head or of windows.
- ONNX Runtime's integer AveragePool divides a window that reaches over the edge by the whole kernel.
Each becomes what its definition says: zeros around, a plain pool and a factor per window; slices; a product with the
matrix of a resize, which is linear along each axis. All of it is exact up to the order of a sum.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.nn import functional as F

from tersenet.deploy.kept_in_float import in_float

aten = torch.ops.aten


def decompose(program: ExportedProgram, rounds: bool) -> ExportedProgram:
    """The same program without the operators that come out wrong.

    Args:
        rounds: whether activations are rounded, so that runtimes look for operators to run in integers.
    """
    table = {**_TABLE, **(_FOR_INT8 if rounds else {})}
    if any(node.target in table for node in program.graph.nodes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about its own parts
            program = program.run_decompositions(table)
    _in_one_order(program.graph)
    return program


def _in_one_order(graph: fx.Graph) -> None:
    """The exporter lays the result of an attention otherwise in memory than the operator does, so that a view of it
    behind a transposition fails: it is copied, which no file shows, and views become reshapes."""
    attentions = [node for node in graph.nodes if node.target is aten.scaled_dot_product_attention.default]
    for node in attentions:
        with graph.inserting_after(node):
            copied = graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
        copied.meta["val"] = node.meta["val"].contiguous()
        node.replace_all_uses_with(copied, delete_user_cb=lambda user, copied=copied: user is not copied)
    for node in graph.nodes if attentions else ():
        if node.target is aten.view.default:
            node.target = aten.reshape.default


def replace_resizes(graph: fx.GraphModule) -> None:
    """Resizes with antialiasing in a captured graph, each as one matrix per axis, in place."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in _RESIZES:
            continue
        arguments: list[Any] = [*node.args, *node.kwargs.values()]
        x, given, align_corners, *scales = arguments
        mode, (height, width) = _RESIZES[node.target], node.args[0].meta["shape"][2:]
        scales = [None, None] if not scales or scales[0] is None else scales[0] if len(scales) == 1 else scales
        counts = [int(n * f) for n, f in zip((height, width), scales, strict=True)] if given is None else list(given)
        with graph.graph.inserting_before(node):
            for axis, size in enumerate((height, width)):
                # A row per unit vector: what the resize makes of it is its column of the matrix.
                matrix = mode(torch.eye(size)[None, None], [size, counts[axis]], align_corners, None, scales[axis])[
                    0, 0
                ]
                name = f"resize_{node.name}_{axis}"
                graph.register_buffer(name, matrix if axis == 1 else matrix.T.contiguous())
                held = graph.graph.get_attr(name)
                x = graph.graph.call_function(aten.matmul.default, (x, held) if axis == 1 else (held, x))
        x.meta = dict(node.meta)
        node.replace_all_uses_with(x)
        graph.graph.erase_node(node)


_RESIZES = {
    aten._upsample_bilinear2d_aa.default: aten._upsample_bilinear2d_aa.default,
    aten._upsample_bilinear2d_aa.vec: aten._upsample_bilinear2d_aa.default,
    aten._upsample_bicubic2d_aa.default: aten._upsample_bicubic2d_aa.default,
    aten._upsample_bicubic2d_aa.vec: aten._upsample_bicubic2d_aa.default,
}


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


def _average(dims: int, pool: Any, rounds: bool = False) -> Callable[..., Any]:
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
        if divisor_override is None and not rounds:
            return NotImplemented  # right in float
        pads = []  # from the last axis to the first
        for (size, k, s, p), count in reversed(list(zip(axes, counts, strict=True))):
            pads += [p, max(0, (count - 1) * s + k - size - p)]
        # OpenVINO would round the average to 8 bits before the factor.
        summed = pool(F.pad(in_float(x) if rounds else x, pads), kernel, steps)
        whole = math.prod(kernel)
        if divisor_override is not None:
            return summed * (whole / divisor_override)
        for place, (axis, count) in enumerate(zip(axes, counts, strict=True)):
            shape = [count if i == place else 1 for i in range(dims)]
            factors = [axis[1] / size for size in _window_sizes(*axis, count, count_include_pad)]
            # By runs of equal numbers: a decomposition cannot hold a constant.
            runs = [(value, len(list(group))) for value, group in itertools.groupby(factors)]
            pieces = [torch.full((length,), value, dtype=x.dtype, device=x.device) for value, length in runs]
            summed = summed * torch.cat(pieces).reshape(shape)
        return summed

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
        return values, torch.zeros_like(values, dtype=torch.int64)  # which no file gives; only the values are used

    return decomposition


def _adaptive_average(x: Tensor, output_size: Sequence[int]) -> Any:
    """(N, C, D, H, W): along one axis after another, as `_adaptive_maximum`."""
    values = x
    for axis, count in enumerate(output_size, start=-3):
        size = int(values.shape[axis])
        ends = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
        parts = [values.narrow(axis, start, end - start).mean(axis, keepdim=True) for start, end in ends]
        values = torch.cat(parts, axis) if count > 1 else parts[0]
    return values


def _padded_around(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """The circular mode: along each axis the end of the values in front of them, and their beginning behind."""
    if mode != "circular" or any(p < 0 for p in pad):
        return NotImplemented
    for i in range(len(pad) // 2):
        axis, before, after = x.dim() - 1 - i, pad[2 * i], pad[2 * i + 1]
        size = x.shape[axis]
        parts = [x.narrow(axis, size - before, before)] if before else []
        parts += [x, *([x.narrow(axis, 0, after)] if after else [])]
        x = torch.cat(parts, axis)
    return x


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """Of other than (N, heads, tokens, features), for which the exporter has an operator."""
    if query.dim() == 4 or enable_gqa or dropout:
        return NotImplemented
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = torch.where(mask, scores, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return torch.softmax(scores, -1) @ value


_TABLE: dict[Any, Callable[..., Any]] = {
    aten.scaled_dot_product_attention.default: _attention,
    aten.avg_pool1d.default: _average(1, F.avg_pool1d),
    aten.avg_pool2d.default: _average(2, F.avg_pool2d),
    aten.avg_pool3d.default: _average(3, F.avg_pool3d),
    aten.max_pool1d.default: _maximum(1, aten.max_pool1d),
    aten.max_pool2d.default: _maximum(2, aten.max_pool2d),
    aten.max_pool3d.default: _maximum(3, aten.max_pool3d),
    aten.adaptive_max_pool1d.default: _adaptive_maximum(1),
    aten.adaptive_max_pool2d.default: _adaptive_maximum(2),
    aten.adaptive_max_pool3d.default: _adaptive_maximum(3),
    aten.adaptive_avg_pool3d.default: _adaptive_average,
    aten.pad.default: _padded_around,
}
_FOR_INT8: dict[Any, Callable[..., Any]] = {
    aten.avg_pool1d.default: _average(1, F.avg_pool1d, rounds=True),
    aten.avg_pool2d.default: _average(2, F.avg_pool2d, rounds=True),
    aten.avg_pool3d.default: _average(3, F.avg_pool3d, rounds=True),
}
