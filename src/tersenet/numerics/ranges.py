"""Which range of values a grid should cover: extremes, a percentile, or that of least squared error or divergence.

Weights are searched on their own values, activations on a histogram. The search over clipped ranges is that of
Banner et al., "Post-training 4-bit quantization of convolution networks", arXiv:1810.05723 (who solve it in closed
form for a Laplace density; here the error is measured on the values, so no density is assumed) and of the "mse"
observers of Nagel et al., "A white paper on neural network quantization", arXiv:2106.08295. The divergence of
histograms is that of Migacz, "8-bit inference with TensorRT", GTC 2017.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersenet.numerics.rounding import fake_quantize, grid

# Candidates of a search: the full range times 1, 0.98, ..., 0.22. It is among them, so no search loses to it.
SHARES = [1 - step / 50 for step in range(40)]

# Of activations at few bits a good range may be a small part of all: 1, 0.95, ..., 0.048 as well.
FEW_BITS_SHARES = sorted({*SHARES, *(0.95**step for step in range(60))}, reverse=True)

# Weights that a search looks at together: few enough to stay in the cache.
_BLOCK = 2**15

# The scale of a channel of zeros. An integer bias has the scale of its channel's weights, so it must not be coarse.
ZEROS = 2.0**-20

# Smaller scales are those of values that are zeros for every purpose. The scale of an integer bias is the product of
# two, its input's and its weights', which must not underflow in float32: batch norms of channels that a training has
# switched off leave weights of 1e-40 when they are folded.
LEAST = 2.0**-60


def weight_scales(weight: Tensor, bits: int = 8, method: str = "mse") -> Tensor:
    """Symmetric scales, one per output channel.

    Args:
        weight: (O, ...).
        method: "mse" tries clipped ranges and keeps the one of least squared error; anything else covers all.
    Returns:
        (O,), positive. A channel of zeros gets `ZEROS`: any scale is exact for it, and a small one serves its bias.
    """
    high = 2 ** (bits - 1) - 1
    rows = weight.detach().reshape(len(weight), -1)  # (O, I H W)
    full = rows.abs().amax(dim=1) / high
    full = torch.where(full > LEAST, full, torch.full_like(full, ZEROS))
    if method != "mse":
        return full
    shares = SHARES if bits > 4 else FEW_BITS_SHARES
    found = []
    block = max(1, _BLOCK // max(1, rows.shape[1]))
    for part, widest in zip(rows.split(block), full.split(block), strict=True):
        best, least = widest, torch.full_like(widest, torch.inf)
        steps, error = torch.empty_like(part), torch.empty_like(part)
        for number, share in enumerate(shares):
            scale = widest * share
            torch.div(part, scale[:, None], out=steps)
            torch.round(steps, out=error)
            error.clamp_(-high, high).sub_(steps)
            squares = torch.linalg.vecdot(error, error) * scale.square()
            better = squares < least
            best, least = torch.where(better, scale, best), torch.where(better, squares, least)
            # What is cut off only grows from here on; where that alone is worse than the best, nothing can follow. Of
            # few bits the best ranges are small, and looking costs more than it spares.
            if high > 7 and number % 4 == 3:
                cut = steps.abs_().sub_(high).clamp_min_(0)
                if bool((torch.linalg.vecdot(cut, cut) * scale.square() > least).all()):
                    break
        found.append(best)
    return torch.cat(found)


@dataclass
class Histogram:
    """Counts of values in equal bins between `low` and `high`; values are added batch by batch.

    Bins count in int64, so no number of samples overflows them.
    """

    low: float
    high: float
    bins: int = 2048

    def __post_init__(self) -> None:
        self.counts = torch.zeros(self.bins, dtype=torch.int64)

    @property
    def centres(self) -> Tensor:
        """(bins,) float64: the middle of each bin."""
        width = (self.high - self.low) / self.bins
        return self.low + width * (torch.arange(self.bins, dtype=torch.float64) + 0.5)

    def add(self, values: Tensor) -> None:
        """Counts some values; those outside go to the nearest end."""
        width = (self.high - self.low) / self.bins
        if width <= 0:
            self.counts[0] += values.numel()
            return
        place = ((values.detach().flatten() - self.low) / width).long().clamp_(0, self.bins - 1)
        self.counts += torch.bincount(place, minlength=self.bins).cpu()


def affine(low: float, high: float, bits: int = 8) -> tuple[float, int]:
    """Scale and zero point of the unsigned grid that covers [low, high] and 0, with 0 exactly on the grid.

    >>> scale, zero_point = affine(0.0, 2.55)
    >>> round(scale, 6), zero_point
    (0.01, 0)
    >>> affine(0.0, 0.0)
    (1.0, 0)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    bottom, top = grid(bits, signed=False)
    scale = (high - low) / top
    if scale < LEAST:
        return 1.0, bottom
    return scale, min(max(round(-low / scale), bottom), top)


def centred(low: float, high: float, most: float = 1.2) -> tuple[float, int] | None:
    """Scale and zero point 128 of the 8-bit grid around 0 that covers [low, high].

    As int8 its zero point is 0, so a convolution with padding needs no correction: with another one, the first layer of
    a ResNet-18 took 1.4 times as long in OpenVINO. None where its steps were more than `most` times `affine`'s:
    images minus their mean need 1.05 to 1.15 times those of the tightest range; 1.2 is a quarter bit lost.

    >>> centred(-2.0, 2.54)
    (0.02, 128)
    >>> centred(0.0, 1.0) is None
    True
    """
    reach = max(-low / 128, high / 127)
    if not reach > LEAST or reach > most * affine(low, high)[0]:
        return None
    return reach, 128


def percentile_range(histogram: Histogram, percentile: float) -> tuple[float, float]:
    """The range that leaves (100 - percentile) percent of the values outside, on each side that has values.

    99.99 leaves one value of ten thousand outside on each side; 100 is min-max.
    """
    total = int(histogram.counts.sum())
    outside = (1 - percentile / 100) * total
    width = (histogram.high - histogram.low) / histogram.bins
    above = histogram.counts.flip(0).cumsum(0).flip(0)  # values in this bin or a higher one
    below = histogram.counts.cumsum(0)
    last = int((above > outside).nonzero().max()) if bool((above > outside).any()) else histogram.bins - 1
    first = int((below > outside).nonzero().min()) if bool((below > outside).any()) else 0
    return histogram.low + first * width, histogram.low + (last + 1) * width


def mse_range(histogram: Histogram, bits: int = 8) -> tuple[float, float]:
    """The range whose rounding has the least squared error over a histogram; never worse there than the full one.

    Each end is moved inwards in turn, twice. With no values below zero the lower end stays at zero.
    """
    used = histogram.counts > 0
    centres, counts = histogram.centres[used], histogram.counts[used].double()
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    shares = torch.tensor(SHARES if bits > 4 else FEW_BITS_SHARES, dtype=torch.float64)
    for _ in range(2):
        if high > 0:
            high = _least(centres, counts, torch.full_like(shares, low), high * shares, bits)[1]
        if low < 0:
            low = _least(centres, counts, low * shares, torch.full_like(shares, high), bits)[0]
    return low, high


def _least(centres: Tensor, counts: Tensor, lows: Tensor, highs: Tensor, bits: int) -> tuple[float, float]:
    """Of some candidate ranges, the one of least squared error; the first of equals."""
    bottom, top = grid(bits, signed=False)
    scales = ((highs - lows) / top).clamp_min(1e-300)[:, None]
    zeros = torch.round(-lows[:, None] / scales).clamp(bottom, top)
    errors = ((fake_quantize(centres[None], scales, zeros, bottom, top) - centres).square() * counts).sum(dim=1)
    best = int(errors.argmin())
    return float(lows[best]), float(highs[best])


def divergence_range(histogram: Histogram, bits: int = 8, candidates: int = 100) -> tuple[float, float]:
    """The range whose rounding changes the distribution least: KL divergence of histograms, after TensorRT.

    P is the histogram inside of the range, what lies outside counted at its ends. Q is the same without what lies
    outside, and flat within each step of the grid, over the bins where P is not 0. The range of least
    sum P log(P / Q) is taken. Each end is moved inwards in turn, twice, but to no fewer bins than the grid has steps.

    Departures: two-sided ranges and affine grids (the paper has magnitudes and a signed grid); Q is mixed with a
    thousandth of P's own bins, evenly, where the paper would divide by 0; zeros, exact on any grid and very many after
    a ReLU, count at most as much as a bin beside theirs.
    """
    counts = _without_heap_of_zeros(histogram)
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if not high > low or histogram.high <= histogram.low or float(counts.sum()) == 0.0:
        return low, high
    fewest = min(1.0, 2**bits / histogram.bins)
    shares = torch.linspace(1, fewest, candidates, dtype=torch.float64)
    for _ in range(2):
        if high > 0:
            tried = high * shares
            high = float(tried[_divergences(histogram, counts, torch.full_like(shares, low), tried, bits).argmin()])
        if low < 0:
            tried = low * shares
            low = float(tried[_divergences(histogram, counts, tried, torch.full_like(shares, high), bits).argmin()])
    return low, high


def _without_heap_of_zeros(histogram: Histogram) -> Tensor:
    """(bins,) counts, that of the bin with 0 in it at most that of the larger one beside it."""
    counts = histogram.counts.double()
    width = (histogram.high - histogram.low) / histogram.bins
    if width <= 0 or not histogram.low <= 0.0 <= histogram.high:
        return counts
    place = min(int(-histogram.low / width), histogram.bins - 1)
    beside = [float(counts[i]) for i in (place - 1, place + 1) if 0 <= i < histogram.bins]
    counts[place] = min(float(counts[place]), max(beside, default=0.0))
    return counts


def _divergences(histogram: Histogram, counts: Tensor, lows: Tensor, highs: Tensor, bits: int) -> Tensor:
    """(R,) KL divergence in nats for each of some ranges."""
    bottom, top = grid(bits, signed=False)
    centres = histogram.centres
    inside = (centres >= lows[:, None]) & (centres <= highs[:, None])  # (R, bins)
    raw = counts * inside
    flat = inside.to(torch.uint8)
    first, last = flat.argmax(dim=1, keepdim=True), flat.shape[1] - 1 - flat.flip(1).argmax(dim=1, keepdim=True)
    below = (counts * (centres < lows[:, None])).sum(dim=1, keepdim=True)
    above = (counts * (centres > highs[:, None])).sum(dim=1, keepdim=True)
    p = raw.scatter_add(1, first, below).scatter_add(1, last, above)
    scales = ((highs - lows) / top).clamp_min(1e-300)[:, None]
    zeros = torch.round(-lows[:, None] / scales).clamp(bottom, top)
    step = (torch.round(centres / scales) + zeros).clamp(bottom, top).long()  # (R, bins)
    used = (p > 0).double()
    empty = p.new_zeros(len(lows), top + 1)
    level = empty.scatter_add(1, step, raw) / empty.scatter_add(1, step, used).clamp(min=1)
    q = level.gather(1, step) * used
    p = p / p.sum(dim=1, keepdim=True).clamp(min=1e-300)
    q = q / q.sum(dim=1, keepdim=True).clamp(min=1e-300)
    q = 0.999 * q + 0.001 * used / used.sum(dim=1, keepdim=True).clamp(min=1)
    terms = torch.where(used > 0, p * torch.log(p.clamp(min=1e-300) / q.clamp(min=1e-300)), 0.0)
    # A range that holds no counts at all says nothing.
    return torch.where(raw.sum(dim=1) > 0, terms.sum(dim=1), torch.inf)
