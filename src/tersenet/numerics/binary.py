"""Weights as scaled signs: one binary basis with its scale, or a sum of a few.

Rastegari et al., "XNOR-Net", arXiv:1603.05279: the scale of a filter is its mean magnitude (binary weight networks),
and of activations a map of means. Lin, Zhao and Pan, "Towards accurate binary convolutional neural network",
arXiv:1711.11294 (ABC-Net): bases from shifted weights and their scales by least squares; the greedy residual is that of
Guo et al., "Network sketching", arXiv:1706.02021, algorithm 2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def signs(x: Tensor) -> Tensor:
    """-1 or +1 in the type of x; +1 for 0, since a bit has no third value.

    >>> signs(torch.tensor([-0.5, 0.0, 2.0]))
    tensor([-1.,  1.,  1.])
    """
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def binary_scale(weight: Tensor) -> Tensor:
    """(O,) scale a of least |w - a sign(w)|^2 per output: the mean magnitude (arXiv:1603.05279, equation 6).

    Differentiable: da/dw = sign(w) / n.

    Args:
        weight: (O, ...).
    """
    return weight.reshape(len(weight), -1).abs().mean(dim=1)


def input_scales(x: Tensor, kernel: tuple[int, int], stride: int = 1, padding: int = 0) -> Tensor:
    """XNOR-Net's K: how large the inputs are under each place of the kernel (arXiv:1603.05279, section 3.2).

    Mean magnitude over channels, then over the window; borders count as zeros.

    Args:
        x: (N, C, H, W).
    Returns:
        (N, 1, H', W') of the convolution's output size.
    """
    sizes = x.abs().mean(dim=1, keepdim=True)
    return torch.nn.functional.avg_pool2d(sizes, kernel, stride, padding)


def shifted_bases(weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """ABC-Net: signs of the weight around shifts of its standard deviation, and their scales by least squares.

    B_i = sign(w - mean + u_i std), u_i evenly in [-1, 1] (0 for one basis); scales minimise |w - sum a_i B_i|^2.

    Args:
        weight: (O, ...); mean, deviation and scales are those of each output. (The paper has one for a layer: give the
            weight as one row.)
        count: M bases, 1 to 4 or more.
    Returns:
        bases (M, O, ...) of -1 and +1, and scales (M, O), in the weight's type.
    """
    rows = weight.detach().reshape(len(weight), -1).double()
    middle, spread = rows.mean(dim=1, keepdim=True), rows.std(dim=1, keepdim=True, correction=0)
    shifts = torch.linspace(-1, 1, count) if count > 1 else torch.zeros(1)
    bases = torch.stack([signs(rows - middle + float(shift) * spread) for shift in shifts])  # (M, O, n)
    return bases.view(count, *weight.shape).to(weight.dtype), fitted_scales(weight, bases)


def greedy_bases(weight: Tensor, count: int, rounds: int = 0) -> tuple[Tensor, Tensor]:
    """Signs of what is left by the bases before, all scales fitted again after each (network sketching, refined).

    Args:
        weight: (O, ...).
        count: M.
        rounds: of improving bases and scales in turns: for given scales each weight takes the best of the 2^M
            combinations, for given bases the scales are fitted. The error never rises.
    Returns:
        bases (M, O, ...) of -1 and +1, and scales (M, O), in the weight's type.
    """
    rows = weight.detach().reshape(len(weight), -1).double()
    bases, scales = rows.new_empty(0, *rows.shape), rows.new_empty(0, len(rows))
    for _ in range(count):
        left = rows - (bases * scales[..., None]).sum(dim=0)
        bases = torch.cat([bases, signs(left)[None]])
        scales = fitted_scales(rows, bases)
    for _ in range(rounds):
        bases = _best_combination(rows, scales)
        scales = fitted_scales(rows, bases)
    return bases.view(count, *weight.shape).to(weight.dtype), scales.to(weight.dtype)


def fitted_scales(weight: Tensor, bases: Tensor) -> Tensor:
    """(M, O) scales of least |w - sum a_i B_i|^2 per output; of bases that are equal, shared among them.

    Args:
        weight: (O, ...).
        bases: (M, O, ...).
    """
    rows = weight.detach().reshape(len(weight), -1).double()
    matrix = bases.reshape(len(bases), *rows.shape).double().movedim(0, 2)  # (O, n, M)
    # The pseudo-inverse takes bases that are equal or opposite; M is small.
    inverse = torch.linalg.pinv(matrix.mT @ matrix, hermitian=True)
    return (inverse @ (matrix.mT @ rows[..., None]))[..., 0].T.to(weight.dtype)


def _best_combination(rows: Tensor, scales: Tensor) -> Tensor:
    """(M, O, n): for each weight, the signs whose scaled sum is nearest."""
    count = len(scales)
    codes = torch.arange(2**count, device=rows.device)
    choices = 2.0 * ((codes >> torch.arange(count, device=rows.device)[:, None]) & 1).double() - 1  # (M, 2^M)
    sums = (scales.double().T @ choices).sort(dim=1)  # (O, 2^M)
    middles = (sums.values[:, 1:] + sums.values[:, :-1]) / 2
    place = torch.searchsorted(middles.contiguous(), rows.contiguous())
    return choices[:, sums.indices.gather(1, place)]
