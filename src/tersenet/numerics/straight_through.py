"""Rounding that trains its own range: LSQ, DoReFa and PACT.

- Esser et al., "Learned step size quantization", arXiv:1902.08153 (LSQ).
- Zhou et al., "DoReFa-Net", arXiv:1606.06160: weights and activations; gradients are not rounded here.
- Choi et al., "PACT", arXiv:1805.06085.
The forward values are computed as in rounding.py, so they are those of the runtimes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tersenet.numerics.rounding import fake_quantize


class _LearnedStep(torch.autograd.Function):
    """In as few passes over the values as plain operators allow, since training on a GPU waits for memory here."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | int, low: float, high: float, factor: float
    ) -> Tensor:
        # With z added to the ends and not to the values: the same whole numbers, two passes less.
        ends = (low - zero_point, high - zero_point)
        y = (x / scale).round_().clamp_(*ends).mul_(scale)  # type: ignore[arg-type]
        ctx.save_for_backward(x, scale, y)
        ctx.grid = (*ends, factor)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        x, scale, y = ctx.saved_tensors
        low, high, factor = ctx.grid
        through = _inside(grads[0], x, scale, low, high)
        total = _pull(grads[0], through, x if x.is_cpu else _without_infinity(x), y, scale)
        if x.is_cpu and not bool(total.isfinite().all()):  # a padding with infinity is outside, but 0 times it is NaN
            total = _pull(grads[0], through, _without_infinity(x), y, scale)
        return through, (total / scale * factor).to(scale.dtype), None, None, None, None


def _pull(gradient: Tensor, through: Tensor, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The gradient of the scale times the scale, in float64: the slope times s is y outside of the grid and y - x
    inside."""
    pull = (gradient * y).addcmul_(through, x, value=-1)
    # Summed in float64, because terms nearly cancel; per sample first, where conversion would cost more than that.
    if scale.dim() == 0:
        return (pull.sum(dim=tuple(range(1, pull.dim()))) if pull.dim() > 1 else pull).sum(dtype=torch.float64)
    return pull.double().sum_to_size(scale.shape)


def _without_infinity(x: Tensor) -> Tensor:
    return x.nan_to_num(math.nan, 0, 0)


def _inside(gradient: Tensor, x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    """The gradient where x is rounded to a value of the grid and not clipped, else 0."""
    if x.is_cpu and scale.dim() == 0:
        # One pass instead of five: a third of the time of a training in few bits. A GPU would be waited for.
        ends = (float((low - 0.5) * scale), float((high + 0.5) * scale))
        return torch.ops.aten.hardtanh_backward(gradient, x, *ends)
    steps = (x / scale).round_()
    return gradient * (steps.clamp(low, high) == steps)


def lsq(x: Tensor, scale: Tensor, zero_point: Tensor | int, low: float, high: float, factor: float) -> Tensor:
    """x on a grid whose scale is trained.

    y = (clamp(round(x / s) + z, low, high) - z) s
    dy/dx = 1 inside of the grid, else 0
    dy/ds = round(x / s) - x / s inside; low - z below; high - z above (equation 3), times `factor`, summed over what
    shares the scale.

    Args:
        x: any shape.
        scale: s > 0, of a shape that broadcasts to x. Keeping it positive is the caller's part.
        zero_point: z, fixed; 0 in the paper.
        low, high: the grid; the paper's has the lowest value too: `grid(bits, signed, full=True)`.
        factor: of the scale's gradient, `lsq_factor`.
    """
    if not torch.is_grad_enabled():
        return fake_quantize(x, scale, zero_point, low, high)
    return _LearnedStep.apply(x, scale, zero_point, low, high, factor)


def lsq_factor(count: int, high: float) -> float:
    """1 / sqrt(count x high): brings the updates of a scale to the size of those of weights (section 2.2).

    Args:
        count: numbers that share the scale: weights, or the activations of one sample.
        high: the grid's highest value.

    >>> lsq_factor(100, 4)
    0.05
    """
    return 1 / math.sqrt(count * high)


def lsq_start(x: Tensor, high: float) -> Tensor:
    """() the paper's first scale, 2 mean |x| / sqrt(high); of zeros, 1."""
    mean = x.detach().abs().double().mean()
    return torch.where(mean > 0, 2 * mean / math.sqrt(high), 1.0).to(x.dtype)


class _Through(torch.autograd.Function):
    """The value of one tensor with the gradient of another, without the rounding error of x + (value - x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def dorefa_weight(weight: Tensor, bits: int) -> Tensor:
    """DoReFa's weights in [-1, 1]: 2 q(tanh(w) / (2 max |tanh(w)|) + 1/2) - 1 (equation 9), q(r) = round(n r) / n.

    n = 2^bits - 1; dq/dr = 1, everything else has its true gradient, the maximum too. The values are odd multiples of
    1 / n and 0 is none of them, so as integers with zero point 0 they need a bit more than `bits`.
    With one bit: sign(w) mean |w| (equation 8), with dy/dw = 1.

    Args:
        weight: any shape; of zeros only, the result is what q gives for 1/2.
        bits: 1 to 8.
    """
    if bits == 1:
        return _Through.apply(
            weight, torch.where(weight >= 0, 1.0, -1.0).to(weight.dtype) * weight.detach().abs().mean()
        )
    bent = torch.tanh(weight)
    unit = bent / (2 * bent.abs().max().clamp(min=torch.finfo(weight.dtype).tiny)) + 0.5
    top = 2**bits - 1
    return 2 * _Through.apply(unit, torch.round(unit.detach() * top) / top) - 1


def dorefa_activation(x: Tensor, bits: int) -> Tensor:
    """round(n clip(x, 0, 1)) / n with n = 2^bits - 1; dy/dx = 1 where 0 <= x <= 1, else 0 (section 2.5)."""
    top = 2**bits - 1
    clipped = x.clamp(0, 1)
    return _Through.apply(clipped, torch.round(clipped.detach() * top) / top)


def pact(x: Tensor, ceiling: Tensor, bits: int) -> Tensor:
    """PACT: clip(x, 0, a), rounded to 2^bits - 1 steps of a.

    dy/dx = 1 where 0 < x < a, else 0; dy/da = 1 where x >= a, else 0, summed (equation 3).

    Args:
        x: any shape.
        ceiling: a > 0, (), learned, with a penalty on its square.
        bits: 2 to 8.
    """
    top = 2**bits - 1
    clipped = torch.where(x < ceiling, x.relu(), ceiling)
    scale = ceiling.detach() / top
    return _Through.apply(clipped, fake_quantize(clipped.detach(), scale, 0, 0, top))
