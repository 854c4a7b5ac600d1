"""How the sizes of values are spread, gathered batch by batch, and the threshold below which a given share lies.

Values are counted in bins of a fixed relative width, found from the bits of the float (exponent and leading bits of
the mantissa), so that one pass is enough, no range has to be known before, and the order of the batches does not
matter. Zeros are counted apart. Within a bin values are taken to be spread evenly.
"""

from __future__ import annotations

import torch
from torch import Tensor

# 2^-40 .. 2^24 in 64 octaves of 64 bins; what is smaller or larger goes to the first or last bin.
_OCTAVES, _FINE, _LOWEST = 64, 6, -40
BINS = _OCTAVES << _FINE
_FIRST = (_LOWEST + 127) << _FINE


def edges() -> Tensor:
    """(BINS + 1,) float64: the bins' bounds, each within its lower bound and just below its upper one."""
    place = torch.arange(BINS + 1, dtype=torch.int64)
    octave, step = place >> _FINE, place & ((1 << _FINE) - 1)
    return torch.exp2((octave + _LOWEST).double()) * (1 + step.double() / (1 << _FINE))


class Magnitudes:
    """Counts of |x|, for one or several rows at once (a row is a layer, or one channel of it).

    Attributes:
        counts: (rows, BINS) int64 of the values that are not zero.
        zeros: (rows,) int64.
    """

    def __init__(self, rows: int = 1) -> None:
        self.counts = torch.zeros(rows, BINS, dtype=torch.int64)
        self.zeros = torch.zeros(rows, dtype=torch.int64)
        bounds = edges()
        self.low, self.high = bounds[:-1], bounds[1:]

    def add(self, values: Tensor) -> None:
        """Args:
        values: (rows, n) finite values of any sign.
        """
        bits = values.detach().float().abs().cpu().contiguous().view(torch.int32)
        place = (bits >> (23 - _FINE)).sub_(_FIRST - 1).clamp_(1, BINS)
        place.masked_fill_(bits == 0, 0).add_(torch.arange(len(bits), dtype=torch.int32)[:, None] * (BINS + 1))
        found = torch.bincount(place.flatten(), minlength=len(bits) * (BINS + 1)).reshape(-1, BINS + 1)
        self.zeros += found[:, 0]
        self.counts += found[:, 1:]

    @property
    def total(self) -> Tensor:
        """(rows,) int64: how many values there were."""
        return self.zeros + self.counts.sum(dim=1)

    def mean_square(self) -> Tensor:
        """(rows,) float64: the mean of x^2, to the width of a bin."""
        squares = self._squares(self.low, self.high)
        return (self.counts * squares).sum(dim=1) / self.total.clamp(min=1)

    def share_below(self, threshold: Tensor) -> Tensor:
        """(rows,) float64: which share of a row's values has |x| <= threshold; zeros always do.

        Args:
            threshold: (rows,) float64, at least 0.
        """
        inside = ((threshold[:, None] - self.low) / (self.high - self.low)).clamp(0, 1)
        return (self.zeros + (self.counts * inside).sum(dim=1)) / self.total.clamp(min=1)

    def error_below(self, threshold: Tensor) -> Tensor:
        """(rows,) float64: the sum of x^2 over |x| <= threshold, as a share of the sum over all; 0 for rows of zeros.

        This is what cutting at the threshold loses, as a squared error.
        """
        top = torch.minimum(torch.maximum(threshold[:, None], self.low), self.high)
        part = (top - self.low) / (self.high - self.low)
        lost = (self.counts * part * self._squares(self.low, top)).sum(dim=1)
        everything = self.mean_square() * self.total
        return lost / everything.clamp(min=torch.finfo(torch.float64).tiny)

    def threshold(self, share: float) -> Tensor:
        """(rows,) float64: the smallest threshold with at least this share of the values at or below it.

        0 where so many are zero already.

        Args:
            share: within [0, 1].
        """
        wanted = share * self.total.double() - self.zeros
        sums = self.counts.cumsum(dim=1).double()
        place = (sums < wanted[:, None]).sum(dim=1).clamp(max=BINS - 1)
        inside = self.counts.gather(1, place[:, None])[:, 0].double()
        before = sums.gather(1, place[:, None])[:, 0] - inside
        part = ((wanted - before) / inside.clamp(min=1)).clamp(0, 1)
        found = self.low[place] + part * (self.high - self.low)[place]
        return torch.where(wanted > 0, found, torch.zeros_like(found))

    @staticmethod
    def _squares(low: Tensor, high: Tensor) -> Tensor:
        """Mean of x^2 for x spread evenly over [low, high]."""
        return (low * low + low * high + high * high) / 3


def equal_marginals(rows: list[Magnitudes], weights: list[float], share: float) -> list[Tensor]:
    """Thresholds that make this share of all values zero at the least weighted sum of relative squared errors.

    Cutting one more value of size t costs weight * t^2 / sum(x^2) in its row. At the least sum this is the same
    everywhere, so t = scale * sqrt(sum(x^2) / weight), with one scale for all; it is found by bisection.

    Args:
        rows: one per place, each with any number of rows.
        weights: one per place, above 0: what a relative squared error costs there.
        share: of all values of all places, within [0, 1).
    Returns:
        (rows,) float64 per place; 0 where so many values are zero already.
    """
    units = [(place.mean_square() * place.total / weight).sqrt() for place, weight in zip(rows, weights, strict=True)]
    everything = sum(int(place.total.sum()) for place in rows)
    if everything == 0 or sum(int(place.zeros.sum()) for place in rows) >= share * everything:
        return [torch.zeros(len(place.zeros), dtype=torch.float64) for place in rows]

    def reached(scale: float) -> float:
        cut = sum(
            float((place.share_below(scale * unit) * place.total).sum())
            for place, unit in zip(rows, units, strict=True)
        )
        return cut / everything

    low, high = 2.0**-60, 2.0**40
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if reached(middle) < share else (low, middle)
    return [high * unit for unit in units]
