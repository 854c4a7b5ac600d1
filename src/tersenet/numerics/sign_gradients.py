"""The sign of activations and weights, with gradients to train through it.

The step has no useful gradient, so a wider one is put in its place:
- clipped: Courbariaux et al., "Binarized neural networks", arXiv:1602.02830: 1 where |x| <= 1, else 0;
- polynomial: Liu et al., "Bi-Real Net", arXiv:1808.00278, equation 7: 2 - 2 |x| where |x| < 1, else 0.
ReActNet (Liu et al., arXiv:2003.03488) shifts the step by a learned amount per channel, and so it does the activation
function after the convolution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersenet.numerics.binary import signs


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.abs() <= 1)
        return signs(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside


class _Polynomial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return signs(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * (2 - 2 * x.abs()).clamp(min=0)


def clipped_sign(x: Tensor) -> Tensor:
    """-1 or +1 (+1 for 0). dy/dx = 1 where |x| <= 1, else 0 (arXiv:1602.02830, equation 4)."""
    return _Clipped.apply(x) if torch.is_grad_enabled() and x.requires_grad else signs(x)


def polynomial_sign(x: Tensor) -> Tensor:
    """-1 or +1 (+1 for 0). dy/dx = max(0, 2 - 2 |x|), the derivative of x (2 - |x|) in [-1, 1] (arXiv:1808.00278)."""
    return _Polynomial.apply(x) if torch.is_grad_enabled() and x.requires_grad else signs(x)


def shifted_sign(x: Tensor, shift: Tensor) -> Tensor:
    """ReActNet's RSign: sign(x - shift), with the polynomial gradient for x, and minus it, summed, for the shift.

    Args:
        x: (N, C, ...).
        shift: (C,), learned.
    """
    return polynomial_sign(x - shift.view(1, -1, *(1,) * (x.dim() - 2)))


def shifted_prelu(x: Tensor, before: Tensor, after: Tensor, slope: Tensor) -> Tensor:
    """ReActNet's RPReLU: prelu(x - before) + after, all learned per channel.

    Args:
        x: (N, C, ...).
        before, after, slope: (C,); slope is that of negative values.
    """
    shape = (1, -1, *(1,) * (x.dim() - 2))
    return torch.nn.functional.prelu(x - before.view(shape), slope) + after.view(shape)


def magnitude_aware(weight: Tensor) -> Tensor:
    """Bi-Real Net's binary weight: sign(w) times the mean magnitude of its output (arXiv:1808.00278, section 3.3).

    Gradient: the sign's is 1 where |w| <= 1, else 0, and the scale is taken for a constant; so
    dy/dw = mean magnitude where |w| <= 1, else 0.

    Args:
        weight: (O, ...).
    """
    scale = weight.detach().abs().flatten(1).mean(dim=1)
    return clipped_sign(weight) * scale.view(-1, *(1,) * (weight.dim() - 1))
