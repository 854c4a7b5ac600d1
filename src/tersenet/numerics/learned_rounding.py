"""Rounding up or down, learned: Nagel et al., "Up or down? Adaptive rounding for post-training quantization",
arXiv:2004.10568 (AdaRound).

Each weight is floor(w / s) + h(V), where h goes smoothly from 0 to 1 and a regulariser drives it to either.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The sigmoid is stretched to (-0.1, 1.1) and cut, so that 0 and 1 are reached (equation 23).
BOTTOM, TOP = -0.1, 1.1


def up_share(learned: Tensor) -> Tensor:
    """h(V) = clip(sigmoid(V) (TOP - BOTTOM) + BOTTOM, 0, 1), true gradient."""
    return (torch.sigmoid(learned) * (TOP - BOTTOM) + BOTTOM).clamp(0, 1)


def start(weight: Tensor, scale: Tensor) -> Tensor:
    """V with h(V) = w / s - floor(w / s): before learning, the soft weight is the float weight.

    Args:
        weight: any shape.
        scale: of a shape that broadcasts to it.
    """
    steps = weight.detach().double() / scale.detach().double()
    share = (steps - torch.floor(steps) - BOTTOM) / (TOP - BOTTOM)
    return torch.logit(share).to(weight.dtype)


def soft_weight(
    weight: Tensor, learned: Tensor, scale: Tensor, zero_point: Tensor | int, low: float, high: float
) -> Tensor:
    """(clamp(floor(w / s) + h(V) + z, low, high) - z) s; its gradient reaches V only (equation 22)."""
    steps = torch.floor(weight.detach() / scale) + up_share(learned) + zero_point
    return (steps.clamp(low, high) - zero_point) * scale


def hard_weight(
    weight: Tensor, learned: Tensor, scale: Tensor, zero_point: Tensor | int, low: float, high: float
) -> Tensor:
    """The weight on the grid: up where h(V) >= 1/2, which is where V >= 0, else down."""
    steps = torch.floor(weight.detach() / scale) + (learned >= 0).to(weight.dtype) + zero_point
    return (steps.clamp(low, high) - zero_point) * scale


def undecided(learned: Tensor, sharpness: float) -> Tensor:
    """The regulariser, sum of 1 - |2 h(V) - 1|^sharpness: 0 where all are decided, else at most 1 for each weight."""
    return (1 - (2 * up_share(learned) - 1).abs().pow(sharpness)).sum()


def sharpness(progress: float, warm: float = 0.2, first: float = 20.0, last: float = 2.0) -> float:
    """The regulariser's exponent over the learning: falls from first to last along a cosine, after a warm-up.

    During the warm-up (progress below `warm`) the regulariser is left out; this is the caller's part.

    >>> sharpness(0.1), sharpness(1.0)
    (20.0, 2.0)
    """
    rest = min(max((progress - warm) / (1 - warm), 0.0), 1.0)
    return last + (first - last) * (1 + math.cos(math.pi * rest)) / 2
