"""What rounding weights does to the mean of a layer's outputs, which its bias can take back.

Nagel et al., "Data-free quantization through weight equalization and bias correction", arXiv:1906.04721, section 4.2:
E[V x] - E[W x] = (V - W) E[x]. E[x] is measured, or of a batch norm and ReLU computed (appendix C).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def output_shift(change: Tensor, input_means: Tensor, groups: int = 1) -> Tensor:
    """(O,) by how much the mean output moves; subtract it from the bias. Borders of zeros are not regarded.

    Args:
        change: (O, I / groups, ...) rounded weight less float weight.
        input_means: (I,) mean of each input channel.
        groups: of the convolution.
    """
    summed = change.detach().double().flatten(2).sum(dim=2) if change.dim() > 2 else change.detach().double()
    means = input_means.detach().double().view(groups, 1, -1)  # (groups, 1, I / groups)
    parts = summed.view(groups, -1, summed.shape[1])  # (groups, O / groups, I / groups)
    return (parts * means).sum(dim=2).flatten().to(change.dtype)


def measured_shift(wanted: Tensor, found: Tensor) -> Tensor:
    """(O,) mean of found - wanted over everything but channels; subtract it from the bias. Borders are regarded.

    Args:
        wanted: (N, O, ...) outputs of the float layer.
        found: the same of the rounded one.
    """
    others = [d for d in range(wanted.dim()) if d != 1]
    return (found.detach().double() - wanted.detach().double()).mean(dim=others).to(wanted.dtype)


def clipped_normal_mean(mean: Tensor, deviation: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
    """Mean of clip(z, low, high) for normal z: of a ReLU (or ReLU6: high = 6) after a batch norm, without data.

    With a = (low - m) / d and b = (high - m) / d, and 0 for a bound that is infinite:
    low P(a) + high (1 - P(b)) + m (P(b) - P(a)) + d (p(a) - p(b)), p being the normal density and P its integral.

    Args:
        mean: (C,) of z, a batch norm's bias.
        deviation: (C,) its weight's magnitude; 0 is a constant.
    """
    m, d = mean.detach().double(), deviation.detach().double().abs()
    safe = d.clamp(min=1e-300)
    a, b = (low - m) / safe, (high - m) / safe
    at_low = low * _below(a) if math.isfinite(low) else torch.zeros_like(m)
    at_high = high * _below(-b) if math.isfinite(high) else torch.zeros_like(m)
    between = m * (_below(b) - _below(a)) + d * (_density(a) - _density(b))
    return torch.where(d > 0, at_low + at_high + between, m.clamp(low, high)).to(mean.dtype)


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def _below(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)
