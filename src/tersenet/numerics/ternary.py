"""Weights of -1, 0 and +1 times a scale: TWN with one scale, TTQ with two learned ones.

Li, Zhang and Liu, "Ternary weight networks", arXiv:1605.04711 (TWN); Zhu et al., "Trained ternary quantization",
arXiv:1612.01064 (TTQ). Departure: the threshold of TWN is found exactly, by sorting, beside the paper's rule of 0.7.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def signs_beyond(weight: Tensor, threshold: Tensor) -> Tensor:
    """-1 below -threshold, +1 above threshold, else 0, in the weight's type.

    Args:
        weight: any shape.
        threshold: of a shape that broadcasts to it.
    """
    return torch.sign(weight) * (weight.abs() > threshold)


def twn_exact(weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Threshold and scale of least squared error, sum of importance (w - scale * sign)^2, for each row.

    With the m largest magnitudes nonzero, scale = sum(h |w|) / sum(h), and the error falls by sum(h |w|)^2 / sum(h);
    all m are tried (TWN's equations 4 and 5; the optimum is among them where importance is equal within a row).

    Args:
        weight: (O, ...); to share one scale in a layer, give it as one row.
        importance: >= 0, of a shape that broadcasts to weight. With it the choice is the best of those by magnitude,
            which need not be the best of all.
    Returns:
        threshold (O,), in the middle between the smallest magnitude that stays and the largest that goes, and scale
        (O,), in the weight's type. A row of zeros has scale 0.
    Cost: O(n log n).
    """
    rows = weight.detach().reshape(len(weight), -1).double().abs()
    heavy = torch.ones_like(rows)
    if importance is not None:
        heavy = importance.detach().expand_as(weight).reshape(rows.shape).double()
    sizes, order = torch.sort(rows, dim=1, descending=True, stable=True)
    heavy = heavy.gather(1, order)
    above, below = (heavy * sizes).cumsum(dim=1), heavy.cumsum(dim=1)
    gains = above.square() / below.clamp(min=1e-300)  # (O, n) for m = 1 .. n
    # While equal magnitudes are added the gain is convex, so none of them is parted from the others.
    best = gains.argmax(dim=1, keepdim=True)
    next_one = torch.nn.functional.pad(sizes[:, 1:], (0, 1))
    threshold = (sizes.gather(1, best) + next_one.gather(1, best)) / 2
    scale = above.gather(1, best) / below.gather(1, best).clamp(min=1e-300)
    return threshold[:, 0].to(weight.dtype), scale[:, 0].to(weight.dtype)


def twn_rule(weight: Tensor, factor: float = 0.7) -> tuple[Tensor, Tensor]:
    """The paper's approximation: threshold = 0.7 mean |w|, scale = the mean magnitude of what lies beyond it.

    Exact for a uniform density (2/3) and nearly so for a normal one (0.75).

    Args:
        weight: (O, ...).
    Returns:
        threshold (O,) and scale (O,), in the weight's type.
    """
    sizes = weight.detach().reshape(len(weight), -1).double().abs()
    threshold = factor * sizes.mean(dim=1)
    beyond = sizes > threshold[:, None].to(weight.dtype).double()
    scale = (sizes * beyond).sum(dim=1) / beyond.sum(dim=1).clamp(min=1)
    return threshold.to(weight.dtype), scale.to(weight.dtype)


class _TwoScales(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, positive: Tensor, negative: Tensor, threshold: Tensor, unit: Tensor, factor: float
    ) -> Tensor:
        signs = signs_beyond(weight, threshold)
        ctx.save_for_backward(signs, positive, negative, unit)
        ctx.factor = factor
        return torch.where(signs > 0, positive, torch.where(signs < 0, -negative, 0.0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        signs, positive, negative, unit = ctx.saved_tensors
        gradient = grads[0]
        slope = torch.where(signs > 0, positive / unit, torch.where(signs < 0, negative / unit, 1.0))
        up = (gradient * (signs > 0)).sum_to_size(positive.shape)
        down = -(gradient * (signs < 0)).sum_to_size(negative.shape)
        return gradient * slope, up * ctx.factor, down * ctx.factor, None, None, None


def ttq(
    weight: Tensor,
    positive: Tensor,
    negative: Tensor,
    threshold: Tensor,
    unit: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:
    """TTQ: positive above the threshold, -negative below minus the threshold, 0 between; all trainable.

    Gradients (arXiv:1612.01064, equations 7 and 8):
    dL/dpositive = sum of dL/dy where y is positive; dL/dnegative = minus the sum where y is negative; both x factor;
    dL/dw = dL/dy times positive / unit, 1 or negative / unit, where w is above, between or below.
    Departures: the paper's equation 7 leaves out that y falls as its negative scale grows; its sign is here. The paper
    has unit = factor = 1, for weights brought to a largest magnitude of 1 and scales of about 1 beside them; where
    weights keep the size that they have in a trained network, its slopes would nearly stop all but those between.

    Args:
        weight: any shape.
        positive, negative: > 0, of a shape that broadcasts to weight, such as ().
        threshold: likewise; the paper's is 0.05 of the largest magnitude of a layer.
        unit: > 0, (); None = 1.
        factor: of the scales' gradients, which are sums over many weights.
    """
    return _TwoScales.apply(weight, positive, negative, threshold, torch.ones(()) if unit is None else unit, factor)


def ttq_start(weight: Tensor, share: float = 0.05) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold = share of the largest magnitude, and the two scales of least squared error for it.

    Args:
        weight: any shape, one set of scales for all of it.
    Returns:
        positive, negative, threshold, each () in the weight's type. Where no weight has a sign, its scale is the other.
    """
    values = weight.detach().double()
    threshold = share * values.abs().max()
    up, down = values[values > threshold], -values[values < -threshold]
    positive = up.mean() if len(up) else (down.mean() if len(down) else torch.ones_like(threshold))
    negative = down.mean() if len(down) else positive
    return positive.to(weight.dtype), negative.to(weight.dtype), threshold.to(weight.dtype)
