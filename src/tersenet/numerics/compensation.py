"""Repairs a layer that lost inputs, by least squares: He et al., "Channel pruning for accelerating very deep neural
networks", arXiv:1707.06168, step (ii). Departure: the solution is drawn to the weights that the layer has instead of
to zero, so that little data does little harm.
"""

from __future__ import annotations

import torch
from torch import Tensor


def least_squares(inputs: Tensor, targets: Tensor, prior: Tensor, ridge: float = 1e-3) -> Tensor:
    """The weight that makes inputs @ weight.T closest to targets, near a prior.

    Minimises |inputs W' - targets|^2 + r |W - prior|^2 with r = ridge times the mean of the Gram matrix's diagonal.
    Solved by the normal equations in float64, over inputs or over rows, whichever are fewer.

    Args:
        inputs: (R, I) rows.
        targets: (R, O).
        prior: (O, I).
        ridge: relative strength; larger is closer to the prior.
    Returns:
        (O, I) in the prior's type.
    Cost: O(R I min(R, I)).
    """
    left = inputs.detach().double()
    wanted = targets.detach().double() - left @ prior.detach().double().T  # (R, O) what the prior leaves
    rows, columns = left.shape
    strength = ridge * float(left.square().sum()) / columns
    if strength == 0.0:
        return prior.detach().clone()
    if rows >= columns:
        gram = left.T @ left
        gram.diagonal().add_(strength)
        change = torch.cholesky_solve(left.T @ wanted, torch.linalg.cholesky(gram))  # (I, O)
    else:
        gram = left @ left.T
        gram.diagonal().add_(strength)
        change = left.T @ torch.cholesky_solve(wanted, torch.linalg.cholesky(gram))
    return (prior.detach().double() + change.T).to(prior.dtype)
