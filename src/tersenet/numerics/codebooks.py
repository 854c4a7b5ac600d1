"""Codebooks of single weights: the k values that a layer shares, of least squared error.

Clustering numbers on a line is solved exactly by dynamic programming (Wang and Song, "Ckmeans.1d.dp", The R Journal
3(2), 2011), here with divide and conquer over the splits (Groenlund et al., arXiv:1701.07204), so it needs no start and
no seed. Sharing weights and training the shared values: Han, Mao and Dally, "Deep compression", arXiv:1510.00149;
importance by the diagonal of the Hessian: Choi, El-Khamy and Lee, arXiv:1612.01543.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# With at most so many distinct values the clustering is exact.
EXACT = 4096


@dataclass(frozen=True)
class _Line:
    """Sorted numbers on the CPU, in float64, with running sums; `sums[i]` is over the first i."""

    values: Tensor  # (n,)
    weights: Tensor  # (n + 1,) running sum of importance
    moments: Tensor  # (n + 1,) of importance times value
    squares: Tensor  # (n + 1,) of importance times value squared

    @classmethod
    def of(cls, values: Tensor, importance: Tensor | None) -> _Line:
        flat = values.detach().flatten().double().cpu()
        heavy = torch.ones_like(flat)
        if importance is not None:
            heavy = importance.detach().expand_as(values).flatten().double().cpu()
            if not bool((heavy > 0).any()):  # nothing is important: all is equally so
                heavy = torch.ones_like(flat)
            flat, heavy = flat[heavy > 0], heavy[heavy > 0]
        flat, order = torch.sort(flat, stable=True)
        heavy = heavy[order]
        sums = [_running(heavy), _running(heavy * flat), _running(heavy * flat * flat)]
        return cls(flat, *sums)

    def cost(self, start: Tensor, end: Tensor) -> Tensor:
        """Squared error of one cluster of the numbers start .. end - 1, around their mean."""
        weight = self.weights[end] - self.weights[start]
        moment = self.moments[end] - self.moments[start]
        square = self.squares[end] - self.squares[start]
        return (square - moment * moment / weight.clamp(min=1e-300)).clamp(min=0.0)

    def means(self, bounds: Tensor, otherwise: Tensor) -> Tensor:
        """(k,) means between bounds (k + 1,), and something else where nothing is between them."""
        weight, moment = self.weights[bounds].diff(), self.moments[bounds].diff()
        return torch.where(weight > 0, moment / weight.clamp(min=1e-300), otherwise)


def _running(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.cumsum(0)])


def optimal_codebook(values: Tensor, count: int, importance: Tensor | None = None) -> Tensor:
    """The values whose nearest ones have the least squared error, sum of importance (x - c(x))^2.

    Exact for at most EXACT distinct values. With more, clusters may only end at EXACT places, half of them evenly
    spaced and half at quantiles, and Lloyd's algorithm then moves the ends; this is no longer surely the optimum.

    Args:
        values: any shape, finite.
        count: k, at least 1.
        importance: >= 0, of a shape that broadcasts to values; values without importance count for nothing.
    Returns:
        (k,) sorted, in the type of the values; fewer where there are fewer distinct values.
    Cost: O(n log n + k EXACT log EXACT), on the CPU.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    # Around their mean, so that running sums of squares lose no digits.
    middle = values.detach().double().mean()
    line = _Line.of(values.detach().double() - middle, importance)
    n = len(line.values)
    ends = torch.cat([(line.values.diff() != 0).nonzero().flatten() + 1, torch.tensor([n])])
    distinct = len(ends)
    if distinct > EXACT:
        ends = _coarser(line.values, ends)
    places = torch.cat([torch.zeros(1, dtype=torch.long), ends])  # where clusters may start and end
    bounds = _best_bounds(line, places, min(count, distinct))
    found = line.means(bounds, torch.zeros(len(bounds) - 1, dtype=torch.float64))
    if distinct > EXACT:
        found = _lloyd(line, found, rounds=20)
    return (found.to(middle.device) + middle).to(values.dtype)


def _coarser(values: Tensor, ends: Tensor) -> Tensor:
    """At most EXACT of the ends: evenly spaced in value, evenly spaced in rank, and the last."""
    half = EXACT // 2
    evenly = torch.linspace(float(values[0]), float(values[-1]), half, dtype=torch.float64)
    by_value = torch.searchsorted(values[ends - 1].contiguous(), evenly).clamp(max=len(ends) - 1)
    by_rank = torch.searchsorted(ends, torch.linspace(1, len(values), half).long()).clamp(max=len(ends) - 1)
    return ends[torch.unique(torch.cat([by_value, by_rank, torch.tensor([len(ends) - 1])]))]


def _best_bounds(line: _Line, places: Tensor, count: int) -> Tensor:
    """(count + 1,) the places between which the clusters lie, of least total cost."""
    total = len(places) - 1
    costs = line.cost(torch.zeros_like(places), places)  # of the first i cells as one cluster
    splits = [torch.zeros_like(places)]
    for _ in range(1, count):
        costs, split = _one_more(line, places, costs)
        splits.append(split)
    bounds = [total]
    for split in reversed(splits):
        bounds.append(int(split[bounds[-1]]))
    return places[torch.tensor(bounds[::-1])]


def _one_more(line: _Line, places: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Of the first i cells, the least cost with one cluster more, and where that cluster starts, for all i.

    The best start does not move back as i grows, so half of the i, then a quarter, ... are searched between the starts
    of those that are known: O(n log n), each level at once.
    """
    total = len(places) - 1
    costs, split = torch.zeros_like(before), torch.zeros(total + 1, dtype=torch.long)
    stride = 1 << (total.bit_length() - 1)  # the largest power of two that is not beyond the end
    known = torch.full((2 * stride + 1,), total, dtype=torch.long)  # starts; beyond the end anything goes
    known[0] = 0
    while stride >= 1:
        ends = torch.arange(stride, total + 1, 2 * stride)
        low, high = known[ends - stride], torch.minimum(known[ends + stride], ends)
        sizes = high - low + 1
        owner = torch.repeat_interleave(torch.arange(len(ends)), sizes)
        first = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)[:-1]])
        starts = low[owner] + torch.arange(len(owner)) - first[owner]
        tried = before[starts] + line.cost(places[starts], places[ends[owner]])
        least = torch.full((len(ends),), torch.inf, dtype=torch.float64)
        least = least.scatter_reduce(0, owner, tried, "amin")
        wins = tried == least[owner]
        chosen = torch.full((len(ends),), total, dtype=torch.long)
        chosen = chosen.scatter_reduce(0, owner[wins], starts[wins], "amin")
        costs[ends], split[ends], known[ends] = least, chosen, chosen
        stride //= 2
    return costs, split


def _lloyd(line: _Line, centres: Tensor, rounds: int) -> Tensor:
    for _ in range(rounds):
        inner = torch.searchsorted(line.values, (centres[1:] + centres[:-1]) / 2, right=True)
        bounds = torch.cat([inner.new_zeros(1), inner, torch.tensor([len(line.values)])])
        moved = line.means(bounds, centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def even_codebook(values: Tensor, count: int, rounds: int = 50, importance: Tensor | None = None) -> Tensor:
    """Deep Compression's own codebook: k values evenly between the extremes, moved by Lloyd's algorithm. To compare.

    Returns:
        (k,) sorted, in the type of the values; some may stand for nothing.
    """
    low, high = values.detach().double().aminmax()
    centres = torch.linspace(float(low), float(high), count, dtype=torch.float64)
    found = _lloyd(_Line.of(values, importance), centres, rounds)
    return found.to(values.device, values.dtype)


def nearest_codes(values: Tensor, codebook: Tensor) -> Tensor:
    """Number of the nearest value of a sorted codebook, int64 in the values' shape; in the middle, the lower one.

    >>> nearest_codes(torch.tensor([0.4, 0.6, 9.0]), torch.tensor([0.0, 1.0, 2.0]))
    tensor([0, 1, 2])
    """
    middles = (codebook[1:].double() + codebook[:-1].double()) / 2
    return torch.bucketize(values.detach().double().contiguous(), middles)


def summed_gradients(gradient: Tensor, codes: Tensor, count: int) -> Tensor:
    """(k,) gradient of the shared values: the sum over the weights that share each, arXiv:1510.00149, equation 3.

    It is what autograd gives for `codebook[codes]`; here it is summed in float64, on the CPU in a fixed order.

    Args:
        gradient: of the weight, any shape.
        codes: integers 0..k-1 in the same shape.
        count: k.
    """
    flat = gradient.detach().flatten().double()
    return torch.bincount(codes.flatten().long(), weights=flat, minlength=count).to(gradient.dtype)
