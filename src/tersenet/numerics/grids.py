"""Uniform grids of 2 to 8 bits for weights: how many steps, around zero or not, and how many weights share a scale.

The arithmetic is that of rounding.py (ONNX's QuantizeLinear and DequantizeLinear). Scales are fitted by least squares,
in two parts: clipped ranges are tried (Banner et al., arXiv:1810.05723; Nagel et al., arXiv:2106.08295), and from the
best of them scale and integers are improved in turns, as in Lloyd's algorithm, each being the optimum for the other.
Errors may be weighted by the importance of each weight, such as the diagonal of a Hessian.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tersenet.errors import SettingsError
from tersenet.numerics.ranges import ZEROS
from tersenet.numerics.rounding import fake_quantize, grid, quantize

# Candidates of a search: the full range times 1, 0.99, ..., 0.82, and on by factors of 0.95 down to 0.04. At 8 bits a
# good range is nearly all of it, at 2 bits a small part.
SHARES = [0.99**step for step in range(20)] + [0.82 * 0.95**step for step in range(60)]
# Rounds of scale and integers in turns; after so many little moves.
TURNS = 4


@dataclass(frozen=True)
class Grid:
    """One description of a uniform grid.

    Args:
        bits: 2 to 8.
        signed: True is symmetric, -(2^(bits-1) - 1) .. 2^(bits-1) - 1 with zero point 0. False is affine,
            0 .. 2^bits - 1 with a zero point, and 0 is always on the grid.
        granularity: what shares a scale: "tensor", "channel" (the first dimension), or a number of inputs: groups of so
            many within each channel, in the order of the flattened inputs (I H W). A last group may be smaller.
        full: a signed grid with -2^(bits-1) as well.
    Raises:
        SettingsError: for other bits or granularities.
    """

    bits: int
    signed: bool = True
    granularity: str | int = "channel"
    full: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SettingsError(f"bits of a grid must lie in 2..8, got {self.bits}")
        sized = isinstance(self.granularity, int) and self.granularity >= 1
        if not sized and self.granularity not in ("tensor", "channel"):
            raise SettingsError(f"granularity must be tensor, channel or inputs per group, got {self.granularity!r}")
        if self.full and not self.signed:
            raise SettingsError(
                "full is for signed grids, got signed=False; an unsigned grid has all its values anyway"
            )

    @property
    def low(self) -> int:
        return grid(self.bits, self.signed, self.full)[0]

    @property
    def high(self) -> int:
        return grid(self.bits, self.signed, self.full)[1]

    def split(self, x: Tensor) -> Tensor:
        """(P, G, K): what shares a scale, side by side. P is 1 or O, and G 1 or the groups; filled up with zeros.

        Zeros are exact on every grid, so filling up changes no range and no error.
        """
        if self.granularity == "tensor":
            return x.reshape(1, 1, -1)
        rows = x.reshape(len(x), -1)  # (O, I H W)
        if not isinstance(self.granularity, int):
            return rows[:, None, :]
        missing = -rows.shape[1] % self.granularity
        return torch.nn.functional.pad(rows, (0, missing)).reshape(len(x), -1, self.granularity)

    def spread(self, scale: Tensor, shape: Sequence[int]) -> Tensor:
        """Scales or zero points (P, G) in a form that broadcasts to a weight of a shape."""
        if not isinstance(self.granularity, int):
            return scale.reshape(-1, *(1,) * (len(shape) - 1))
        inputs = int(torch.Size(shape[1:]).numel())
        return scale.repeat_interleave(self.granularity, dim=1)[:, :inputs].reshape(shape)

    def round(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """x on the grid, in its own shape and type, with the straight-through gradient of rounding.fake_quantize."""
        return fake_quantize(x, self.spread(scale, x.shape), self.spread(zero_point, x.shape), self.low, self.high)

    def integers(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The integers of x on the grid, in its own shape: int8, of an unsigned grid uint8."""
        steps = quantize(x, self.spread(scale, x.shape), self.spread(zero_point, x.shape), self.low, self.high)
        return steps.to(torch.int8 if self.signed else torch.uint8)


def extremes(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grids that reach over all values, and 0.

    Args:
        x: (O, ...), finite.
    Returns:
        Scale and zero point, (P, G) each, in the type of x. Where all is zero the scale is `ranges.ZEROS`.
    """
    parts = grid.split(x.detach())
    return _of_range(*_reach(parts), grid)


def least_squares_scales(x: Tensor, grid: Grid, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of least squared error, sum of importance (x - rounded x)^2 over what shares a scale.

    No search of this kind is sure to find the optimum, but no result is worse than `extremes` (in exact arithmetic).

    Args:
        x: (O, ...), finite.
        importance: >= 0, of a shape that broadcasts to x; None: all equal.
    Returns:
        Scale and zero point, (P, G) each, in the type of x.
    Cost: 85 roundings of x, twice as many for an unsigned grid with values on both sides.
    """
    parts = grid.split(x.detach())
    weights = None if importance is None else grid.split(importance.detach().to(x.dtype).expand_as(x))
    low, high = _reach(parts)
    best = _Best(parts, weights, grid)
    best.offer(*_of_range(low, high, grid))
    if grid.signed:
        for share in SHARES[1:]:
            best.offer(*_of_range(low * share, high * share, grid))
    else:
        _move_ends(best, low, high)
    for _ in range(TURNS):
        best.improve()
    return best.scale, best.zero_point


def _reach(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each part, (P, G), both ends at least 0."""
    return parts.amin(dim=2).clamp(max=0), parts.amax(dim=2).clamp(min=0)


def _of_range(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that reaches from low to high."""
    if grid.signed:
        # With a lowest value of its own, negative values have one step more than positive ones.
        scale = torch.maximum(high / grid.high, low / grid.low)
    else:
        scale = (high - low) / grid.high
    # A scale that underflows to 0 would divide by 0; such weights are zeros for every purpose.
    scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.full_like(scale, ZEROS))
    if grid.signed:
        return scale, torch.zeros_like(scale)
    return scale, torch.round(-low / scale).clamp(0, grid.high)


def _move_ends(best: _Best, low: Tensor, high: Tensor) -> None:
    """Of an affine grid: both ends are moved inwards together, then each on its own."""
    grid, near, far = best.grid, low.clone(), high.clone()
    for share in SHARES[1:]:
        better = best.offer(*_of_range(low * share, high * share, grid))
        near, far = torch.where(better, low * share, near), torch.where(better, high * share, far)
    for share in SHARES[1:45]:
        best.offer(*_of_range(near * share, far, grid))
        best.offer(*_of_range(near, far * share, grid))


class _Best:
    """The best scale and zero point of each part by now."""

    def __init__(self, parts: Tensor, importance: Tensor | None, grid: Grid) -> None:
        self.parts, self.importance, self.grid = parts, importance, grid
        self.scale, self.zero_point = parts.new_ones(parts.shape[:2]), parts.new_zeros(parts.shape[:2])
        self.error = torch.full(parts.shape[:2], torch.inf, dtype=torch.float64, device=parts.device)

    def offer(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Takes another scale where it is better; (P, G) bool, where it was."""
        made = fake_quantize(self.parts, scale[..., None], zero_point[..., None], self.grid.low, self.grid.high)
        errors = (made - self.parts).square_()
        if self.importance is not None:
            errors *= self.importance
        error = errors.sum(dim=2, dtype=torch.float64)
        better = error < self.error
        self.scale = torch.where(better, scale, self.scale)
        self.zero_point = torch.where(better, zero_point, self.zero_point)
        self.error = torch.where(better, error, self.error)
        return better

    def improve(self) -> None:
        """With k = integer - zero point: scale = sum(h x k) / sum(h k^2), the optimum for these integers."""
        zero_point = self.zero_point[..., None]
        steps = quantize(self.parts, self.scale[..., None], zero_point, self.grid.low, self.grid.high) - zero_point
        pull = steps if self.importance is None else steps * self.importance
        above = (pull * self.parts).sum(dim=2, dtype=torch.float64)
        below = (pull * steps).sum(dim=2, dtype=torch.float64)
        found = (above / below.clamp(min=1e-300)).to(self.scale.dtype)
        # No step at all, or a scale that underflows: what was there stays.
        usable = (below > 0) & (found > torch.finfo(found.dtype).tiny)
        self.offer(torch.where(usable, found, self.scale), self.zero_point)
