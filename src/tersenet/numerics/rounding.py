"""Uniform rounding to a grid of integers, the arithmetic of every integer format.

The formula is that of ONNX's QuantizeLinear (round half to even, then add the zero point, then saturate), so that what
PyTorch simulates is what a runtime computes. The gradient is the straight-through estimator: Bengio, Leonard &
Courville, "Estimating or propagating gradients through stochastic neurons", arXiv:1308.3432, cut to zero outside the
grid as in Jacob et al., arXiv:1712.05877.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def grid(bits: int, signed: bool, full: bool = False) -> tuple[int, int]:
    """Lowest and highest integer of a format. The signed grid leaves out its lowest value, so that it is symmetric.

    Args:
        bits: 2 to 8.
        signed: around 0, or from 0 upwards.
        full: a signed grid with its lowest value, which counts at 2 and 3 bits.

    >>> grid(8, signed=True), grid(8, signed=False), grid(2, signed=True)
    ((-127, 127), (0, 255), (-1, 1))
    >>> grid(2, signed=True, full=True)
    (-2, 1)

    Raises:
        ValueError: outside of 2 to 8 bits.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must lie in 2..8, got {bits}")
    half = 2 ** (bits - 1)
    return (1 - half - full, half - 1) if signed else (0, 2**bits - 1)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int, low: float, high: float) -> Tensor:
    """q = clamp(round(x / scale) + zero_point, low, high), as floats that hold integers.

    Args:
        x: any shape.
        scale: positive, of a shape that broadcasts to x.
        zero_point: the integer that stands for 0.
        low, high: the grid, as from `grid`.
    """
    return torch.clamp(torch.round(x / scale) + zero_point, low, high)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | int) -> Tensor:
    """x = (q - zero_point) * scale."""
    return (q - zero_point) * scale


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | int, low: float, high: float) -> Tensor:
        steps = torch.round(x / scale) + zero_point
        if ctx is not None:
            ctx.save_for_backward((steps >= low) & (steps <= high))
        return dequantize(torch.clamp(steps, low, high), scale, zero_point)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int, low: float, high: float) -> Tensor:
    """x rounded to the grid and back: the values that a runtime computes with, trainable.

    y = (clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale
    dy/dx = 1 where low <= round(x / scale) + zero_point <= high, else 0; the scale gets no gradient.

    >>> fake_quantize(torch.tensor([0.24, -9.0]), torch.tensor(0.1), 0, -127, 127)[0]
    tensor(0.2000)
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _StraightThrough.apply(x, scale, zero_point, low, high)
    single = scale.dim() == 0 and (not isinstance(zero_point, Tensor) or zero_point.dim() == 0)
    if single and not torch.compiler.is_compiling():  # a captured graph gets operators that write into nothing
        whole = (x / scale).round_().add_(zero_point).clamp_(low, high)
        return whole.sub_(zero_point).mul_(scale)  # in place: half of the time
    return (torch.clamp(torch.round(x / scale) + zero_point, low, high) - zero_point) * scale
