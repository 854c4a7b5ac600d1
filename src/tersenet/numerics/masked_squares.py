"""Least squares with some unknowns held at zero: what the weights that stay do best once the others are gone.

For a given choice of zeros this is where optimal brain surgeon ends on a layer's own squared error (Frantar and
Alistarh, arXiv:2208.11580). Departure: not one solve per row, O(O I^3), but conjugate gradients on all rows at once,
O(O I^2) a round; each round lowers the error, so stopping early does no harm.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_least_squares(
    gram: Tensor, cross: Tensor, prior: Tensor, stays: Tensor, ridge: float = 1e-4, rounds: int = 200
) -> Tensor:
    """Minimises |X V' - T|^2 + r |V - prior|^2 with V = 0 where nothing stays, r = ridge * mean of gram's diagonal.

    Args:
        gram: (I, I) X' X.
        cross: (O, I) T' X.
        prior: (O, I), where the search starts, too.
        stays: (O, I) bool.
        rounds: at most; it ends when all rows' residuals are below 1e-7 of what they are for V = 0.
    Returns:
        (O, I) in the prior's type, exactly 0 where nothing stays.
    """
    start = prior.detach().double()
    damped = gram.detach().double().clone()
    strength = ridge * float(damped.diagonal().mean())
    if strength == 0.0:
        return prior.detach() * stays
    damped.diagonal().add_(strength)
    wanted = (cross.detach().double() + strength * start) * stays
    diagonal = damped.diagonal()
    values = start * stays
    residual = (wanted - values @ damped) * stays
    scaled = residual / diagonal
    direction, power = scaled, (residual * scaled).sum(dim=1, keepdim=True)
    enough = 1e-14 * (wanted * wanted / diagonal).sum(dim=1, keepdim=True)
    for _ in range(rounds):
        active = power > enough
        if not bool(active.any()):
            break
        moved = (direction @ damped) * stays
        curvature = (direction * moved).sum(dim=1, keepdim=True)
        length = torch.where(active & (curvature > 0), power / curvature.clamp(min=1e-300), 0.0)
        values = values + length * direction
        residual = residual - length * moved
        scaled = residual / diagonal
        power, before = (residual * scaled).sum(dim=1, keepdim=True), power
        direction = scaled + power / before.clamp(min=1e-300) * direction
    return values.to(prior.dtype)
