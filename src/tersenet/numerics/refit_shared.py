"""The best shared values for weights whose codes are fixed: codebooks, scales of ternary weights, of binary bases.

A row of weights is `design @ shared`, so that its squared error over a layer's inputs, (v - w) H (v - w)' with their
Gram matrix H, is a parabola in what is shared. It is the second half of each turn of repaired rounding
(numerics/repaired_rounding.py has it for grids).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersenet.numerics.repaired_rounding import damped


def refit_shared(weight: Tensor, design: Tensor, gram: Tensor, shared: Tensor, damping: float = 0.01) -> Tensor:
    """The shared values of least squared error.

    Args:
        weight: (..., O, I), what the layer should compute with.
        design: (..., O, I, M): how often each shared value is in each weight; one-hot for a codebook of M values, -1, 0
            or 1 for a scale, M signs for M bases.
        gram: (..., I, I).
        shared: (1, M), the same for all rows, or (O', M), O' being all rows together; kept where nothing uses a value.
    Returns:
        Like `shared`, in its type.
    Cost: O(O I^2 M).
    """
    hessian = damped(gram, damping)[..., None, :, :]  # (..., 1, I, I)
    basis = design.detach().double()
    pulled = hessian @ basis  # (..., O, I, M)
    normal = (basis.mT @ pulled).flatten(0, -3)  # (O', M, M)
    target = (weight.detach().double()[..., None, :] @ pulled).flatten(0, -3)[:, 0]  # (O', M)
    if len(shared) == 1:
        normal, target = normal.sum(dim=0, keepdim=True), target.sum(dim=0, keepdim=True)
    used = normal.diagonal(dim1=1, dim2=2) > 0
    # The pseudo-inverse takes bases that are equal or opposite; M is small.
    found = (torch.linalg.pinv(normal, hermitian=True) @ target[..., None])[..., 0]
    return torch.where(used, found.to(shared.dtype), shared)
