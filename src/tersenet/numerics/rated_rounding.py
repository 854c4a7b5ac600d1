"""Rounding that knows what every value costs in a file: error of a layer's outputs + price x bits is made small.

Entropy-coded grids need no few levels, so what matters is the step of each row and which values are taken. Steps come
from the theory of high rates (Gish and Pierce, "Asymptotically efficient quantizing", IEEE Trans. IT 14(5), 1968): a
uniform grid is within 0.25 bits of the best there is, and what one more bit buys is the same everywhere where the step
is in proportion to 1 / sqrt(sensitivity). Columns are rounded as in GPTQ (Frantar et al., arXiv:2210.17323), what is
left of the error going to those that follow; then single weights are visited again. Each weight takes the nearest
value, the next one towards zero, or zero, whichever has the least error + price x bits (rate-distortion optimized
quantization of video coders; of networks in DeepCABAC, Wiedemann et al., arXiv:1907.11900, where weights are taken one
by one without the Hessian). All work is in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (a column, (G, O) whole numbers) -> (G, O) bits of them at that column.
Bits = Callable[[int, Tensor], Tensor]
# (G, O, I) whole numbers -> what other numbers would cost in their places.
Costs = Callable[[Tensor], Bits]

LARGEST = 250  # whole numbers reach from -LARGEST to LARGEST


def steps_of(gram: Tensor, sensitivity: Tensor, price: float, width: float) -> Tensor:
    """(G, O) the steps at which one bit more would buy about as much in every row.

    The damage of a row is sensitivity / 2 x change H change'. After GPTQ a column's share of it is that of the
    Cholesky factor's diagonal, so a row counts by its geometric mean, det(H)^(1 / I).

    Args:
        gram: (G, I, I) damped.
        sensitivity: (G, O) at least 0.
        price: damage per bit, above 0.
        width: the step is width x sqrt(price / (sensitivity x that mean)). With the damage of a uniform grid,
            step^2 / 12 a weight, and 6 dB a bit it would be sqrt(12 / ln 2) = 4.2 at high rates; zeros that are chosen
            want it smaller.
    Returns:
        Rounded to 4 significant bits, so that steps take little room and their products with small numbers are exact.
    """
    factor = torch.linalg.cholesky(gram)
    mean = torch.exp(2 * factor.diagonal(dim1=-2, dim2=-1).log().mean(dim=-1, keepdim=True))  # (G, 1)
    return rounded(width * torch.sqrt(price / (sensitivity * mean).clamp(min=1e-300)), 4)


def rounded(x: Tensor, digits: int) -> Tensor:
    """x with so many significant binary digits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(mantissa * 2**digits) / 2**digits, exponent)


def round_rated(
    weight: Tensor,
    gram: Tensor,
    sensitivity: Tensor,
    step: Tensor,
    price: float,
    costs: Costs,
    rounds: int = 2,
    sweeps: int = 2,
) -> Tensor:
    """Whole numbers q with little sensitivity / 2 x (w - q step) H (w - q step)' + price x bits, summed over rows.

    Args:
        weight: (G, O, I), groups of a convolution first.
        gram: (G, I, I) damped; of the inputs.
        sensitivity: (G, O).
        step: (G, O) above 0.
        price: of a bit, at least 0.
        costs: what numbers cost; asked again before each round, of the numbers that there are by then.
        rounds: of column after column, each with the costs that the one before it ends at.
        sweeps: visits of single weights after that.
    Returns:
        (G, O, I) float64 whole numbers, at most LARGEST in magnitude.
    Cost: O(G (I^3 + (rounds + sweeps) O I^2)).
    """
    target = weight.detach().double()
    q = (target.sign() * torch.floor(target.abs() / step[..., None] + 0.4)).clamp(-LARGEST, LARGEST)
    order = torch.argsort(gram.diagonal(dim1=-2, dim2=-1).mean(dim=0), descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[:, order[:, None], order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for _ in range(rounds):
        q = _columns(target, factor, order, sensitivity, step, price, costs(q))
    for _ in range(sweeps):
        q, moved = _sweep(target, q, gram, sensitivity, step, price, costs(q))
        if not moved:
            break
    return q


def _best(value: Tensor, curvature: Tensor, step: Tensor, price: float, bits: Bits, column: int) -> Tensor:
    """(G, O) the numbers of least curvature x (value - q step)^2 + price x bits, of the three candidates."""
    share = value / step
    nearest = torch.round(share).clamp(-LARGEST, LARGEST)
    below = nearest - nearest.sign()
    best, least = nearest, curvature * ((share - nearest) * step).square() + price * bits(column, nearest)
    for candidate in (below, torch.zeros_like(nearest)):
        cost = curvature * ((share - candidate) * step).square() + price * bits(column, candidate)
        better = cost < least
        best, least = torch.where(better, candidate, best), torch.where(better, cost, least)
    return best


def _columns(
    weight: Tensor, factor: Tensor, order: Tensor, sensitivity: Tensor, step: Tensor, price: float, bits: Bits
) -> Tensor:
    """GPTQ with prices, in blocks of columns; `factor` is (G, I, I), upper, of the ordered inverse."""
    columns: list[int] = order.tolist()
    left, found = weight[..., order].clone(), torch.empty_like(weight)
    for start in range(0, len(columns), 64):
        end = min(start + 64, len(columns))
        errors = torch.zeros_like(left[..., start:end])
        for j in range(start, end):
            scale = factor[:, j, j, None]  # (G, 1); its square is one over what a change costs once others follow
            q = _best(left[..., j], sensitivity / (2 * scale.square()), step, price, bits, columns[j])
            found[..., columns[j]] = q
            error = (left[..., j] - q * step) / scale
            left[..., j:end] -= error[..., None] * factor[:, None, j, j:end]
            errors[..., j - start] = error
        left[..., end:] -= errors @ factor[:, start:end, end:]
    return found


def _sweep(
    weight: Tensor, q: Tensor, gram: Tensor, sensitivity: Tensor, step: Tensor, price: float, bits: Bits
) -> tuple[Tensor, bool]:
    """Visits every weight once, all others standing still: the numbers, and whether any moved."""
    q, inputs, moved = q.clone(), weight.shape[-1], False
    slope = (q * step[..., None] - weight) @ gram  # (G, O, I)
    curvature = gram.diagonal(dim1=-2, dim2=-1)  # (G, I)
    for first in range(0, inputs, 64):
        end = min(first + 64, inputs)
        near, changes = slope[..., first:end].clone(), torch.zeros_like(slope[..., first:end])
        for j in range(first, end):
            bend = curvature[:, j, None]  # (G, 1)
            value = q[..., j] * step - near[..., j - first] / bend
            best = _best(value, sensitivity * bend / 2, step, price, bits, j)
            change = (best - q[..., j]) * step
            near += change[..., None] * gram[:, None, j, first:end]
            changes[..., j - first], q[..., j] = change, best
        if bool(changes.any()):
            moved = True
            slope += changes @ gram[:, first:end]
    return q, moved
