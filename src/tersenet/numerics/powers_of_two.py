"""Weights that are 0 or plus or minus a power of two, so that products are shifts.

Zhou et al., "Incremental network quantization", arXiv:1702.03044: the set of values (section 2.1, equations 1 to 4) and
the choice of which weights are rounded next (section 2.2, by magnitude).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def exponents(weight: Tensor, bits: int) -> tuple[int, int]:
    """Lowest and highest exponent of a layer; one of the 2^bits codes means 0, and one more is not used.

    highest = floor(log2(4 s / 3)) with s the largest magnitude; lowest = highest + 1 - 2^(bits - 2).
    (The paper writes 2^(bits - 1) / 2.)

    >>> exponents(torch.tensor([1.0, -0.3]), bits=5)
    (-7, 0)
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must lie in 2..8, got {bits}")
    largest = float(weight.detach().abs().max())
    if largest == 0.0:
        return 0, 0
    top = int(torch.floor(torch.log2(torch.tensor(4 * largest / 3, dtype=torch.float64))))
    return top + 1 - 2 ** (bits - 2), top


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, low: int, high: int) -> Tensor:
        return _nearest(weight, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def round_power(weight: Tensor, low: int, high: int) -> Tensor:
    """The nearest of 0 and +-2^low ... +-2^high; in the middle between two, the larger magnitude.

    dy/dw = 1 everywhere (straight-through).

    >>> round_power(torch.tensor([0.74, 0.76, -0.1, 0.3]), low=-2, high=0)
    tensor([0.5000, 1.0000, -0.0000, 0.2500])
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        return _StraightThrough.apply(weight, low, high)
    return _nearest(weight, low, high)


def _nearest(weight: Tensor, low: int, high: int) -> Tensor:
    size = weight.detach().abs().double()
    # b is nearest to |w| in [3b/4, 3b/2), so its exponent is floor(log2(4 |w| / 3)); frexp has no error of rounding.
    power = (torch.frexp(4 * size / 3).exponent - 1).clamp(low, high)
    made = torch.where(size < 2.0 ** (low - 1), 0.0, torch.exp2(power.double()))
    return (made * torch.sign(weight)).to(weight.dtype)


def rounded_first(weight: Tensor, share: float, rounded: Tensor | None = None) -> Tensor:
    """Which weights are rounded by now: those that were, and then the largest, until a share of all is reached.

    The paper's shares are 0.5, 0.75, 0.875, 1, each followed by training of the rest.

    Args:
        weight: any shape.
        share: 0 to 1, of all weights.
        rounded: bool, those already rounded.
    Returns:
        bool in the weight's shape. Of equal magnitudes the first come first.
    """
    flat = weight.detach().flatten().abs().double()
    before = torch.zeros_like(flat, dtype=torch.bool) if rounded is None else rounded.flatten()
    wanted = max(round(share * flat.numel()), int(before.sum()))
    order = torch.argsort(torch.where(before, torch.inf, flat), descending=True, stable=True)
    now = torch.zeros_like(before)
    now[order[:wanted]] = True
    return now.view(weight.shape)
