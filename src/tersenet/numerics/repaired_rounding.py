"""Rounding repaired by second order: each weight is rounded, and those not yet rounded make up for it.

A layer's own squared error, |x W' - x V'|^2 over its inputs x, is the sum over outputs of (v - w) H (v - w)' with
H = sum x x' (the Gram matrix). Column by column: Frantar et al., "GPTQ", arXiv:2210.17323, after Frantar, Singh and
Alistarh, "Optimal brain compression", arXiv:2208.11580: damped, in blocks, in the order of the activations. Then
`descend` visits single weights again and moves each to the best value that it may have (coordinate descent, as in
Behdin et al., "QuantEase", arXiv:2309.01885), and `refit_scales` gives the best scales for the integers found.

What a weight may be is a function `nearest(values, column)`, so grids, codebooks and powers of two are repaired alike.
Departures: columns that no input reaches are rounded to nearest and not set to zero; scales of groups are those of the
weights before the repair, so that any order of columns goes with any groups; all work is in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tersenet.numerics.codebooks import nearest_codes
from tersenet.numerics.grids import Grid, least_squares_scales
from tersenet.numerics.rounding import fake_quantize

# (..., O) values of one column of weights, and its number -> the nearest that are allowed, in float64.
Nearest = Callable[[Tensor, int], Tensor]


def damped(gram: Tensor, damping: float = 0.01) -> Tensor:
    """The Gram matrix in float64 with damping x the mean of its diagonal added to it; of zeros, the identity.

    Args:
        gram: (..., I, I) sum or mean of x x' over the layer's inputs.
    """
    matrix = gram.detach().double().clone()
    strength = damping * matrix.diagonal(dim1=-2, dim2=-1).mean(dim=-1, keepdim=True)
    matrix.diagonal(dim1=-2, dim2=-1).add_(torch.where(strength > 0, strength, 1.0))
    return matrix


def layer_error(change: Tensor, gram: Tensor) -> Tensor:
    """(..., O) squared error of each output, change H change', in the units of the outputs squared.

    Args:
        change: (..., O, I) of the weights.
        gram: (..., I, I).
    """
    moved = change.double()
    return ((moved @ gram.double()) * moved).sum(dim=-1)


def onto_grid(grid: Grid, scale: Tensor, zero_point: Tensor, shape: torch.Size) -> Nearest:
    """`nearest` for a uniform grid.

    Args:
        scale, zero_point: (P, G), as from numerics.grids.
        shape: (..., O, I) of the weights to be repaired; all but the last are the grid's channels, in their order.
    """
    flat = torch.Size((shape[:-1].numel(), shape[-1]))
    scales, zeros = (grid.spread(part.double(), flat).expand(flat).reshape(shape) for part in (scale, zero_point))
    return lambda values, column: fake_quantize(values, scales[..., column], zeros[..., column], grid.low, grid.high)


def onto_codebook(codebook: Tensor) -> Nearest:
    """`nearest` for the shared values of a layer.

    Args:
        codebook: (k,) sorted, as from numerics.codebooks.
    """
    shared = codebook.detach().double()
    return lambda values, _: shared[nearest_codes(values, codebook)]


def round_columns(
    weight: Tensor, gram: Tensor, nearest: Nearest, damping: float = 0.01, by_activation: bool = True, block: int = 128
) -> Tensor:
    """GPTQ: rounds column after column; what is left of the error goes to the columns that follow.

    Args:
        weight: (..., O, I); leading dimensions are groups of a convolution, each with a Gram matrix of its own.
        gram: (..., I, I).
        nearest: what the weights of a column may be.
        damping: relative to the mean of the Gram matrix's diagonal.
        by_activation: columns in falling order of the Gram matrix's diagonal (of several, of its mean).
        block: columns whose effect on all later ones is added up before it is applied.
    Returns:
        (..., O, I) in the weight's type, each value from `nearest`.
    Cost: O(I^3 + O I^2).
    """
    hessian = damped(gram, damping)
    inputs = weight.shape[-1]
    order = torch.arange(inputs, device=weight.device)
    if by_activation:
        strength = hessian.diagonal(dim1=-2, dim2=-1).reshape(-1, inputs).mean(dim=0)
        order = torch.argsort(strength, descending=True, stable=True)
    columns: list[int] = order.tolist()
    hessian = hessian[..., order[:, None], order]
    # Row j of this factor of H^-1 holds what column j's error does to the columns after it.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left = weight.detach().double()[..., order]  # (..., O, I)
    made = torch.empty_like(left)
    for start in range(0, inputs, block):
        end = min(start + block, inputs)
        errors = torch.zeros_like(left[..., start:end])
        for j in range(start, end):
            made[..., j] = nearest(left[..., j], columns[j])
            error = (left[..., j] - made[..., j]) / factor[..., j, j, None]
            left[..., j:end] -= error[..., None] * factor[..., None, j, j:end]
            errors[..., j - start] = error
        left[..., end:] -= errors @ factor[..., start:end, end:]
    return made[..., torch.argsort(order)].to(weight.dtype)


def descend(
    weight: Tensor,
    start: Tensor,
    gram: Tensor,
    nearest: Nearest,
    damping: float = 0.01,
    sweeps: int = 4,
    block: int = 128,
) -> Tensor:
    """Moves one weight after another to the allowed value that is best given all others; the error never rises.

    Args:
        weight: (..., O, I), what the layer should compute with.
        start: (..., O, I), allowed values, such as from `round_columns`.
        gram: (..., I, I).
        nearest: what the weights of a column may be; the error of one weight is a parabola, so nearest is best.
        sweeps: over all columns, at most; it ends when nothing moves.
    Returns:
        (..., O, I) in the weight's type.
    Cost: O(O I^2) per sweep.
    """
    hessian = damped(gram, damping)
    curvature = hessian.diagonal(dim1=-2, dim2=-1)  # (..., I)
    made = start.detach().double().clone()
    slope = (made - weight.detach().double()) @ hessian  # (..., O, I), half the gradient
    inputs = weight.shape[-1]
    for _ in range(sweeps):
        moved = False
        for first in range(0, inputs, block):
            end = min(first + block, inputs)
            near = slope[..., first:end].clone()
            changes = torch.zeros_like(near)
            for j in range(first, end):
                best = nearest(made[..., j] - near[..., j - first] / curvature[..., j, None], j)
                change = best - made[..., j]
                near += change[..., None] * hessian[..., None, j, first:end]
                changes[..., j - first], made[..., j] = change, best
            # The start may be float32 values of the grid, which are off by their last bit.
            if bool((changes.abs() > 1e-6 * made[..., first:end].abs()).any()):
                moved = True
                slope += changes @ hessian[..., first:end, :]
        if not moved:
            break
    return made.to(weight.dtype)


def refit_scales(
    weight: Tensor, steps: Tensor, gram: Tensor, grid: Grid, scale: Tensor, damping: float = 0.01
) -> Tensor:
    """The scales of least squared error for given integers: linear least squares, all groups of a row together.

    Args:
        weight: (..., O, I).
        steps: (..., O, I) integers less their zero points.
        gram: (..., I, I).
        scale: (P, G), kept where a scale would not be positive.
    Returns:
        (P, G) in the type of the scale.
    Cost: O(O I^2 + O G^2 I).
    """
    hessian = damped(gram, damping)
    wanted, whole = weight.detach().double() @ hessian, steps.detach().double()  # (..., O, I)
    if not isinstance(grid.granularity, int):
        above, below = (wanted * whole).sum(dim=-1), layer_error(whole, hessian)  # (..., O)
        if grid.granularity == "tensor":
            above, below = above.sum(), below.sum()
        found = (above / below.clamp(min=1e-300)).reshape(scale.shape)
    else:
        found = _refit_groups(wanted, whole, hessian, grid, scale)
    return torch.where(found > torch.finfo(scale.dtype).tiny, found.to(scale.dtype), scale)


def _refit_groups(wanted: Tensor, whole: Tensor, hessian: Tensor, grid: Grid, scale: Tensor) -> Tensor:
    """(O, G): per row, the normal equations of its G scales. A group without any step has nothing to say."""
    inputs, outputs = whole.shape[-1], whole.shape[-2]
    group = torch.arange(inputs, device=whole.device) // int(grid.granularity)
    member = torch.nn.functional.one_hot(group, scale.shape[1]).double()  # (I, G)
    found = torch.empty(scale.shape, dtype=torch.float64, device=scale.device)
    rows, targets, matrices = whole.reshape(-1, inputs), wanted.reshape(-1, inputs), hessian.reshape(-1, inputs, inputs)
    for place, (row, target) in enumerate(zip(rows, targets, strict=True)):
        basis = row[:, None] * member  # (I, G)
        normal = basis.T @ (matrices[place // outputs] @ basis)
        unused = normal.diagonal() == 0
        normal.diagonal().add_(unused.double())
        found[place] = torch.linalg.solve(normal, basis.T @ target)
    return found


def keeping(nearest: Nearest, keep: Tensor | None) -> Nearest:
    """`nearest`, and zero where `keep` (..., O, I) is 0, as under a mask."""
    return nearest if keep is None else lambda values, column: nearest(values, column) * keep[..., column]


def round_to_grid(
    weight: Tensor, gram: Tensor, grid: Grid, damping: float = 0.01, rounds: int = 2, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """All of the above in turns: scales by the Gram matrix's diagonal, GPTQ, descent, better scales, descent again.

    Args:
        weight: (..., O, I); all but the last dimension are the grid's channels.
        gram: (..., I, I).
        rounds: of descent and new scales, after GPTQ.
        keep: (..., O, I) 0 for weights that must stay zero, else 1.
    Returns:
        The rounded weight (..., O, I), and scale and zero point (P, G). Rounding the result with them changes nothing.
        Its error (with the damped Gram matrix) is at most that of plain rounding with the first scales.
    """
    shape, hessian = weight.shape, damped(gram, damping)
    flat = torch.Size((shape[:-1].numel(), shape[-1]))
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)[..., None, :].expand(shape).reshape(flat)
    if keep is not None:
        weight = weight * keep
    scale, zero_point = least_squares_scales(weight.reshape(flat), grid, diagonal)
    nearest = keeping(onto_grid(grid, scale, zero_point, shape), keep)
    plain = grid.round(weight.detach().reshape(flat), scale, zero_point).reshape(shape)
    made = round_columns(weight, gram, nearest, damping)
    # Column by column is greedy: for a row now and then plain rounding is the better start.
    worse = layer_error(made - weight, hessian) > layer_error(plain - weight, hessian)
    made = torch.where(worse[..., None], plain, made)
    for turn in range(rounds + 1):
        made = descend(weight, made, gram, nearest, damping)
        if turn == rounds:
            break
        zeros = grid.spread(zero_point, flat)
        steps = grid.integers(made.reshape(flat), scale, zero_point).to(weight.dtype) - zeros
        scale = refit_scales(weight, steps.reshape(shape), gram, grid, scale, damping)
        made = (steps * grid.spread(scale, flat)).reshape(shape)
        nearest = keeping(onto_grid(grid, scale, zero_point, shape), keep)
    return made, scale, zero_point
