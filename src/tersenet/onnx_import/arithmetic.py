"""Arithmetic, comparisons and conversions, entry by entry."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tersenet.onnx_import.call import Call
from tersenet.onnx_import.registry import HANDLERS, operator
from tersenet.onnx_import.values import DTYPES, Host


def _of_one(function: Callable[[Tensor], Tensor]) -> Callable[[Call], Tensor]:
    return lambda call: function(call.tensor(0))


HANDLERS.update(
    {
        "Abs": _of_one(torch.abs), "Neg": _of_one(torch.neg), "Sqrt": _of_one(torch.sqrt), "Exp": _of_one(torch.exp),
        "Log": _of_one(torch.log), "Reciprocal": _of_one(torch.reciprocal), "Floor": _of_one(torch.floor),
        "Ceil": _of_one(torch.ceil), "Round": _of_one(torch.round), "Sign": _of_one(torch.sign),
        "Erf": _of_one(torch.erf), "Sin": _of_one(torch.sin), "Cos": _of_one(torch.cos), "Tan": _of_one(torch.tan),
        "Asin": _of_one(torch.asin), "Acos": _of_one(torch.acos), "Atan": _of_one(torch.atan),
        "Sinh": _of_one(torch.sinh), "Cosh": _of_one(torch.cosh), "Asinh": _of_one(torch.asinh),
        "Acosh": _of_one(torch.acosh), "Atanh": _of_one(torch.atanh), "Not": _of_one(torch.logical_not),
        "BitwiseNot": _of_one(torch.bitwise_not), "IsNaN": _of_one(torch.isnan), "Identity": _of_one(lambda x: x),
    }
)  # fmt: skip


def _pair(call: Call) -> tuple[Any, Any]:
    """Two operands, one of them at least a tensor."""
    first, second = call.operand(0, call.rank(1)), call.operand(1, call.rank(0))
    if not isinstance(first, Tensor) and not isinstance(second, Tensor):
        first = call.tensor(0)
    return first, second


def _of_two(function: Callable[[Any, Any], Tensor]) -> Callable[[Call], Tensor]:
    return lambda call: function(*_pair(call))


HANDLERS.update(
    {
        "Add": _of_two(lambda a, b: a + b), "Sub": _of_two(lambda a, b: a - b), "Mul": _of_two(lambda a, b: a * b),
        "Equal": _of_two(lambda a, b: a == b), "Greater": _of_two(lambda a, b: a > b),
        "Less": _of_two(lambda a, b: a < b), "GreaterOrEqual": _of_two(lambda a, b: a >= b),
        "LessOrEqual": _of_two(lambda a, b: a <= b), "And": _of_two(lambda a, b: a & b),
        "Or": _of_two(lambda a, b: a | b), "Xor": _of_two(lambda a, b: a ^ b),
        "BitwiseAnd": _of_two(lambda a, b: a & b), "BitwiseOr": _of_two(lambda a, b: a | b),
        "BitwiseXor": _of_two(lambda a, b: a ^ b),
    }
)  # fmt: skip


def _dtype(*values: Any) -> torch.dtype:
    return next(value.dtype for value in values if isinstance(value, Tensor))


@operator("Div")
def divide(call: Call) -> Tensor:
    a, b = _pair(call)
    if _dtype(a, b).is_floating_point:
        return a / b
    return torch.div(a if isinstance(a, Tensor) else torch.as_tensor(a), b, rounding_mode="trunc")


@operator("Mod")
def modulo(call: Call) -> Tensor:
    a, b = _pair(call)
    a = a if isinstance(a, Tensor) else torch.as_tensor(a)
    return torch.fmod(a, b) if call.attribute("fmod", 0) else torch.remainder(a, b)


@operator("Pow")
def power(call: Call) -> Tensor:
    a, b = _pair(call)
    result = torch.pow(a, b)
    first = call.values[0]
    return result.to(first.dtype) if isinstance(first, Tensor) else result


@operator("Min", "Max")
def extreme(call: Call) -> Tensor:
    function = torch.minimum if call.step.op == "Min" else torch.maximum
    tensors = [call.tensor(i) for i in range(len(call.values))]
    return functools.reduce(function, tensors)


@operator("Sum", "Mean")
def together(call: Call) -> Tensor:
    count = len(call.values)
    total = functools.reduce(lambda a, b: a + b, [call.tensor(i) for i in range(count)])
    return total / count if call.step.op == "Mean" else total


@operator("IsInf")
def is_infinite(call: Call) -> Tensor:
    x = call.tensor(0)
    result = torch.zeros_like(x, dtype=torch.bool)
    result = result | (x == torch.inf) if call.attribute("detect_positive", 1) else result
    return result | (x == -torch.inf) if call.attribute("detect_negative", 1) else result


@operator("Where")
def where(call: Call) -> Tensor:
    rank = call.rank(0, 1, 2)
    condition = call.tensor(0)
    a, b = call.operand(1, rank), call.operand(2, rank)
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        a = call.tensor(1)
    return torch.where(condition, a, b)


@operator("Cast", "CastLike")
def cast(call: Call) -> Tensor | Host:
    call.ignore("saturate", "round_mode")
    if call.step.op == "CastLike":
        dtype, value = call.tensor(1).dtype, call.constant(0)
        if value is None or dtype == torch.bfloat16:
            return call.tensor(0).to(dtype)
        return Host(value.array.astype(str(dtype).removeprefix("torch.")), call.step.outputs[0], value.learned)
    to = call.attribute("to")
    if to not in DTYPES:
        call.refuse(f"converts to ONNX's data type {to}, which torch's models do not have here")
    return call.tensor(0).to(DTYPES[to])


@operator("Dropout")
def dropout(call: Call) -> Any:
    """The identity in evaluation."""
    call.ignore("ratio", "seed")
    x = call.tensor(0)
    if call.has(2) and bool(call.host(2, "training mode").all()):
        call.refuse("is in training mode; export the model in evaluation mode")
    return (x, torch.ones_like(x, dtype=torch.bool)) if call.uses(1) else x
