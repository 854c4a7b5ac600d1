"""The order in which the positions of a convolution kernel are coded, and which known ones each is foretold from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

LARGEST_KERNEL = 64
_FIRST_BLOCK = 256
_LARGEST_BLOCK = 1 << 16


def kernel(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Height and width of the kernels of a tensor; None where it has none of 2 to 64 numbers."""
    if len(shape) < 3 or not 2 <= math.prod(shape[2:]) <= LARGEST_KERNEL:
        return None
    return math.prod(shape[2:-1]), shape[-1]


@dataclass(frozen=True)
class Phase:
    """Positions of a kernel that are coded together, and for each the known ones that it is foretold from."""

    positions: tuple[int, ...]
    before: int  # positions known before these
    sources: tuple[tuple[int, ...], ...]  # as places in the order of coding

    @property
    def stop(self) -> int:
        return self.before + len(self.positions)


@lru_cache(maxsize=64)
def phases(height: int, width: int, distance: int) -> tuple[Phase, ...]:
    """The centre, then positions by how often 2 divides their distance from it, edges before corners; row by row
    within a phase.

    Sources lie at most `distance` steps away, a step being what the phase halves.
    """
    centre_y, centre_x = height // 2, width // 2

    def rank(y: int, x: int) -> tuple[int, int]:
        dy, dx = abs(y - centre_y), abs(x - centre_x)
        if not dy | dx:
            return (-LARGEST_KERNEL, 0)
        halvings = ((dy | dx) & -(dy | dx)).bit_length() - 1
        return (-halvings, (dy >> halvings & 1) & (dx >> halvings & 1))

    ranks = {(y, x): rank(y, x) for y in range(height) for x in range(width)}
    found, known = [], list[tuple[int, int]]()
    for current in sorted(set(ranks.values())):
        places = [place for place, its in ranks.items() if its == current]
        reach = distance << -current[0] if known else 0
        near = tuple(
            tuple(i for i, (v, u) in enumerate(known) if distance and max(abs(v - y), abs(u - x)) <= reach)
            for y, x in places
        )
        found.append(Phase(tuple(y * width + x for y, x in places), len(known), near))
        known += places
    return tuple(found)


def blocks(rows: int, groups: int, plan: Sequence[Phase]) -> Iterator[tuple[Phase, int, int]]:
    """(phase, first row, row after the last)."""
    for phase in plan:
        size, first = len(phase.positions), 0
        while first < rows:
            known = (phase.before * rows + first * size) * groups
            most = _LARGEST_BLOCK if phase.before else min(max(_FIRST_BLOCK, 3 * known), _LARGEST_BLOCK)
            stop = min(rows, first + max(1, most // (groups * size)))
            yield phase, first, stop
            first = stop
