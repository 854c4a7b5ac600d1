"""Which units of which layers go: by share, percentile or absolute value, layer by layer or over the whole model.

Shares are counted in weights, so that layers with smaller units (the rest of a 16x1 block) count for what they are. A
layer never loses its best unit, so none is emptied. Equal scores go in the layers' order: nothing here draws lots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from tersenet.numerics.patterns import Pattern, expand, protected, unit_sums

Scope = Literal["layer", "global"]
ScopeSetting = Literal["auto", "layer", "global"]


def scope_of(setting: str, importance: str) -> Any:
    """What "auto" stands for: within one layer lamp ranks as magnitudes do, it is made to compare layers."""
    return setting if setting != "auto" else "global" if importance == "lamp" else "layer"


@dataclass(frozen=True)
class Cutoff:
    """How much goes; exactly one is set.

    Args:
        share: zeros among all weights, 0 to 1, those that are there already counted in; the nearest number of units.
        percentile: of the scores of units that are there, 0 to 100, linear between two; what scores less goes.
        value: what scores less than this goes.
    """

    share: float | None = None
    percentile: float | None = None
    value: float | None = None


@dataclass(frozen=True)
class Scored:
    """A layer before the choice.

    Args:
        scores: (O, I, ...) of single weights, output channels first; a unit scores their mean.
        present: (O, I, ...) bool, the weights that may stay; what is gone does not come back.
        pattern: what goes together.
    """

    scores: Tensor
    present: Tensor
    pattern: Pattern


def output_first(layer: nn.Module, tensor: Tensor) -> Tensor:
    """(O, I, ...) of a layer's weight or mask. Transposed convolutions store (I, O, ...); this is its own inverse."""
    return tensor.transpose(0, 1) if isinstance(layer, _ConvTransposeNd) else tensor


def choose(scored: Mapping[str, Scored], cutoff: Cutoff, scope: Scope = "layer") -> dict[str, Tensor]:
    """Path -> (O, I, ...) bool, true where a weight stays; a subset of what was present."""
    groups = [list(scored)] if scope == "global" else [[path] for path in scored]
    kept: dict[str, Tensor] = {}
    for paths in groups:
        units = [_Units(scored[path]) for path in paths]
        stays = _stays(units, cutoff).split([len(part.scores) for part in units])
        for path, part, stay in zip(paths, units, stays, strict=True):
            present = scored[path].present
            whole = expand(stay.reshape(part.shape), tuple(present.shape), scored[path].pattern)
            kept[path] = whole & present
    return kept


class _Units:
    """The units of one layer, flat: scores (-inf: gone, +inf: must stay), and how many present weights each has."""

    def __init__(self, layer: Scored) -> None:
        present, pattern = layer.present.double(), layer.pattern
        sizes = unit_sums(present, pattern)
        sums = unit_sums(torch.where(layer.present, layer.scores.double(), 0.0), pattern)
        scores = torch.where(sizes > 0, sums / sizes.clamp(min=1), -torch.inf)
        self.shape, self.total = scores.shape, layer.present.numel()
        self.sizes, self.true = sizes.flatten(), scores.flatten()
        stays = protected(scores, pattern).flatten() & (self.sizes > 0)
        stays[self.true.argmax()] = True
        self.scores = torch.where(stays, torch.inf, self.true)


def _stays(units: list[_Units], cutoff: Cutoff) -> Tensor:
    """(units,) bool for all layers of a scope."""
    scores, sizes = torch.cat([part.scores for part in units]), torch.cat([part.sizes for part in units])
    gone, free = scores == -torch.inf, torch.isfinite(scores)
    if cutoff.share is None:
        limit = cutoff.value
        if cutoff.percentile is not None:
            limit = float(_percentile(units, cutoff.percentile))
        assert limit is not None
        return ~(gone | (free & (scores < limit)))
    total = sum(part.total for part in units)
    wanted = cutoff.share * total - (total - float(sizes.sum()))  # more zeros than there are
    order = scores.argsort(stable=True)
    order = order[free[order]]
    zeros = torch.cat([torch.zeros(1, dtype=sizes.dtype, device=sizes.device), sizes[order].cumsum(0)])
    count = int((zeros - wanted).abs().argmin())  # the first of two that are as near: fewer zeros
    stays = ~gone
    stays[order[:count]] = False
    return stays


def _percentile(units: list[_Units], percent: float) -> Tensor:
    """The percentile of the true scores of what is there, with the best units, which only stay."""
    known = torch.cat([part.true[part.sizes > 0] for part in units]).sort().values
    place = (len(known) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(known) - 1)
    return known[low] + (known[high] - known[low]) * (place - low)
