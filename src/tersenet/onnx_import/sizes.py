"""Arithmetic with sizes: operators on arrays that hold symbols of torch.export, by numpy.

Only what exporters write to compute shapes; anything else on such arrays is computed as a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tersenet.onnx_import.call import Call
from tersenet.onnx_import.values import objects, scalar

Sizes = Callable[[Call], Any]
SIZES: dict[str, Sizes] = {}


def _sizes(*names: str) -> Callable[[Sizes], Sizes]:
    def register(function: Sizes) -> Sizes:
        for name in names:
            SIZES[name] = function
        return function

    return register


def _array(call: Call, index: int) -> np.ndarray:
    return call.host(index, "sizes")


def _divide(a: Any, b: Any) -> Any:
    integers = not any(isinstance(each, float | np.floating | torch.SymFloat) for each in (a, b))
    return a // b if integers else a / b


def _minimum(a: Any, b: Any) -> Any:
    return torch.sym_min(a, b)


def _maximum(a: Any, b: Any) -> Any:
    return torch.sym_max(a, b)


def _plain(entry: Any) -> Any:
    return entry.item() if isinstance(entry, np.generic) else entry


def _elementwise(function: Callable[..., Any]) -> Sizes:
    def compute(call: Call) -> np.ndarray:
        arrays = np.broadcast_arrays(*(_array(call, i).astype(object) for i in range(len(call.values))))
        entries = [function(*map(_plain, each)) for each in zip(*(array.flat for array in arrays), strict=True)]
        return objects(entries).reshape(arrays[0].shape)

    return compute


SIZES |= {
    "Add": _elementwise(lambda a, b: a + b),
    "Sub": _elementwise(lambda a, b: a - b),
    "Mul": _elementwise(lambda a, b: a * b),
    "Div": _elementwise(_divide),
    "Mod": _elementwise(lambda a, b: a % b),
    "Min": _elementwise(_minimum),
    "Max": _elementwise(_maximum),
    "Neg": _elementwise(lambda a: -a),
    "Equal": _elementwise(lambda a, b: bool(a == b)),
    "Greater": _elementwise(lambda a, b: bool(a > b)),
    "Less": _elementwise(lambda a, b: bool(a < b)),
    "GreaterOrEqual": _elementwise(lambda a, b: bool(a >= b)),
    "LessOrEqual": _elementwise(lambda a, b: bool(a <= b)),
    "Where": _elementwise(lambda c, a, b: a if c else b),
}


@_sizes("Cast")
def _cast(call: Call) -> np.ndarray:
    to = call.attribute("to")
    convert = torch.sym_float if to in (1, 10, 11, 16) else torch.sym_int
    array = _array(call, 0)
    return objects(convert(_plain(entry)) for entry in array.flat).reshape(array.shape)


@_sizes("Identity")
def _identity(call: Call) -> np.ndarray:
    return _array(call, 0)


@_sizes("Gather")
def _gather(call: Call) -> np.ndarray:
    taken = np.take(_array(call, 0), _array(call, 1), axis=call.attribute("axis", 0))
    return taken if isinstance(taken, np.ndarray) else objects([taken]).reshape(())


@_sizes("Concat")
def _concat(call: Call) -> np.ndarray:
    return np.concatenate([_array(call, i) for i in range(len(call.values))], axis=call.attribute("axis"))


@_sizes("Slice")
def _slice(call: Call) -> np.ndarray:
    array = _array(call, 0)
    if call.attribute("starts") is not None:
        starts, ends = call.attribute("starts"), call.attribute("ends")
        axes, steps = call.attribute("axes", list(range(len(starts)))), [1] * len(starts)
    else:
        starts, ends = call.ints(1, "starts"), call.ints(2, "ends")
        axes = call.ints(3, "axes") if call.has(3) else list(range(len(starts)))
        steps = call.ints(4, "steps") if call.has(4) else [1] * len(starts)
    where = [slice(None)] * array.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        where[axis] = slice(start, None if step < 0 and end < -array.shape[axis] else end, step)
    return array[tuple(where)]


@_sizes("Split")
def _split(call: Call) -> tuple[np.ndarray, ...]:
    array, axis = _array(call, 0), call.attribute("axis", 0)
    sizes = call.attribute("split") or (call.ints(1, "sizes") if call.has(1) else None)
    if sizes is None:
        return tuple(np.array_split(array, len(call.step.outputs), axis))
    return tuple(np.split(array, np.cumsum(sizes)[:-1], axis))


@_sizes("Unsqueeze")
def _unsqueeze(call: Call) -> np.ndarray:
    axes = call.axes(1) or []
    rank = _array(call, 0).ndim + len(axes)
    return np.expand_dims(_array(call, 0), tuple(axis % rank for axis in axes))


@_sizes("Squeeze")
def _squeeze(call: Call) -> np.ndarray:
    axes = call.axes(1)
    return np.squeeze(_array(call, 0), None if axes is None else tuple(axes))


@_sizes("Reshape")
def _reshape(call: Call) -> np.ndarray:
    return _array(call, 0).reshape(call.ints(1, "shape"))


@_sizes("ReduceProd")
def _product(call: Call) -> np.ndarray:
    axes, keep = call.axes(1), call.attribute("keepdims", 1)
    array = _array(call, 0)
    product = np.multiply.reduce(array, axis=None if axes is None else tuple(axes), keepdims=bool(keep))  # type: ignore[call-overload]
    return product if isinstance(product, np.ndarray) else objects([product]).reshape(())


@_sizes("Shape")
def _shape(call: Call) -> np.ndarray:
    return np.array(_array(call, 0).shape, np.int64)


@_sizes("Range")
def _range(call: Call) -> Any:
    start, end, step = (scalar(_array(call, i)) for i in range(3))
    return torch.arange(start, end, step)


@_sizes("ConstantOfShape")
def _filled(call: Call) -> Any:
    value = call.attribute("value")
    value = np.zeros(1, np.float32) if value is None else np.asarray(value)
    return torch.full(
        [scalar(np.asarray(entry, dtype=object)) for entry in _array(call, 0).flat],
        scalar(value),
        dtype=torch.from_numpy(value.reshape(-1)).dtype,
    )
