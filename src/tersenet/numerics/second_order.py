"""Optimal brain surgeon on blocks: inverse Hessians, and what the weights that stay do to make up for those that go.

Hassibi and Stork 1993, "Second order derivatives for network pruning: Optimal brain surgeon". Two Hessians:
- of the loss, from gradients of samples, in blocks along the diagonal: WoodFisher (Singh and Alistarh,
  arXiv:2004.14340), as used by Kurtic et al., arXiv:2203.07259;
- of a layer's own squared error, which is the Gram matrix of its inputs, the same for every output: Frantar and
  Alistarh, arXiv:2208.11580.
Departure: all weights that go, go at once, and the rest moves to the optimum given that; the papers go one by one, or
row by row, which chooses better and ends at the same weights for the same choice.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fisher_blocks(gradients: Tensor, size: int, ridge: float = 1e-2) -> Tensor:
    """Inverses of the blocks of an empirical Fisher matrix, (1 / M) sum of g g' + damping.

    Args:
        gradients: (M, n) of M samples.
        size: B, of a block; the last one is filled with weights that have no gradient.
        ridge: damping, relative to the mean of the diagonal.
    Returns:
        (ceil(n / B), B, B) float64.
    Cost: O(n B (M + B^2)).
    """
    samples, count = gradients.shape
    blocks = -(-count // size)
    padded = torch.zeros(samples, blocks * size, dtype=torch.float64, device=gradients.device)
    padded[:, :count] = gradients.detach()
    parts = padded.view(samples, blocks, size).movedim(0, 1)  # (blocks, M, B)
    fisher = parts.mT @ parts / samples
    strength = ridge * float(fisher.diagonal(dim1=1, dim2=2).mean()) or 1.0
    fisher.diagonal(dim1=1, dim2=2).add_(strength)
    return torch.linalg.inv(fisher)


def inverse_diagonal(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Diagonal of `fisher_blocks` in the shape of the weight, for saliency.obs."""
    return blocks.diagonal(dim1=1, dim2=2).flatten()[: shape.numel()].view(shape)


def surgeon(weight: Tensor, stays: Tensor, blocks: Tensor) -> Tensor:
    """The weight after some of it went and the rest of each block made up for it.

    With Q what goes: w - [H^-1]_:Q ([H^-1]_QQ)^-1 w_Q, the minimum of (v - w)' H (v - w) with v_Q = 0.

    Args:
        weight: any shape, n numbers.
        stays: bool, the same shape.
        blocks: (ceil(n / B), B, B) inverses of the Hessian's blocks, of `fisher_blocks`.
    Returns:
        The weight's shape and type, exactly 0 where nothing stays.
    """
    count, size = weight.numel(), blocks.shape[-1]
    flat = torch.zeros(len(blocks) * size, dtype=torch.float64, device=weight.device)
    flat[:count] = weight.detach().flatten()
    gone = torch.zeros(len(blocks) * size, dtype=torch.float64, device=weight.device)
    gone[:count] = (~stays).flatten().double()
    values, gone = flat.view(-1, size, 1), gone.view(-1, size, 1)
    # One matrix for every block: H^-1 among what goes, the identity for what stays.
    among = blocks * gone * gone.mT + torch.diag_embed((1 - gone).squeeze(2))
    moved = values - blocks @ (gone * torch.linalg.solve(among, gone * values))
    return (moved.flatten()[:count].view(weight.shape) * stays).to(weight.dtype)


def refit_rows(weight: Tensor, stays: Tensor, gram: Tensor, ridge: float = 1e-4) -> Tensor:
    """The weight with zeros that gives the least squared error of a layer's own output, row by row.

    Args:
        weight: (O, I).
        stays: (O, I) bool.
        gram: (I, I) sum or mean of x x' over the layer's inputs.
        ridge: relative to the mean of the Gram matrix's diagonal; draws to the weights that are there.
    Returns:
        (O, I) in the weight's type, exactly 0 where nothing stays.
    Cost: O(O I^3), a batch of rows at a time.
    """
    wanted = weight.detach().double()
    damped = gram.detach().double().clone()
    damped.diagonal().add_(ridge * float(damped.diagonal().mean()) or 1.0)
    targets = wanted @ damped  # (O, I)
    result = torch.zeros_like(wanted)
    rows = max(1, 2**24 // max(1, gram.numel()))
    for start in range(0, len(wanted), rows):
        keep = stays[start : start + rows].double()[:, :, None]  # (rows, I, 1)
        among = damped * keep * keep.mT + torch.diag_embed(1 - keep.squeeze(2))
        part = torch.linalg.solve(among, keep * targets[start : start + rows, :, None])
        result[start : start + rows] = (part * keep).squeeze(2)
    return result.to(weight.dtype)
