"""The coefficients that foretell the positions of a kernel from those that are known: fitted, laid out, and whether
they are worth their bits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersenet.codec.phases import Phase

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

LARGEST = 127  # of the coefficients, in sixteenths
_BITS = 5  # of one, roughly


def flat(coefficients: dict[int, Floats | None], plan: Sequence[Phase]) -> NDArray[np.int32]:
    """Those that are not 0 by construction, in the order of phases, positions and sources."""
    parts = [np.empty(0, np.float32)]
    for phase in plan:
        weights = coefficients[phase.before]
        if weights is not None:
            parts += [row[list(sources)] for row, sources in zip(weights, phase.sources, strict=True)]
    return np.concatenate(parts).astype(np.int32)


def unflat(found: NDArray[Any], plan: Sequence[Phase]) -> dict[int, Floats | None]:
    """What `flat` was given."""
    at, out = 0, dict[int, Floats | None]()
    for phase in plan:
        out[phase.before] = weights = no_weights(phase)
        if weights is not None:
            size = sum(map(len, phase.sources))
            weights[_rows(phase.sources)] = found[at : at + size]
            at += size
    return out


@lru_cache(maxsize=256)
def _rows(sources: tuple[tuple[int, ...], ...]) -> tuple[Ints, Ints]:
    """Where the coefficients of a phase go in its matrix."""
    pairs = [(i, source) for i, each in enumerate(sources) for source in each]
    rows, columns = np.array(pairs, np.int64).reshape(-1, 2).T
    return rows, columns


def no_weights(phase: Phase) -> Floats | None:
    """(P, known positions) zeros; None where nothing is foretold."""
    return np.zeros((len(phase.positions), phase.before), np.float32) if any(phase.sources) else None


def fitted(planes: Floats, plan: Sequence[Phase]) -> dict[int, Floats | None]:
    """For each phase, by the positions known before it: (P, known) coefficients in sixteenths that foretell it from
    the planes (K, N) with the least squares.

    Sums are of whole numbers and exact, and the elimination goes element by element in a fixed order, so that the
    same numbers give the same file everywhere.
    """
    exact = planes.astype(np.float64)
    products = exact @ exact.T
    out = dict[int, Floats | None]()
    for phase in plan:
        out[phase.before] = weights = no_weights(phase)
        for i, sources in enumerate(phase.sources):
            if weights is not None and sources:
                weights[i, list(sources)] = _solved(products, list(sources), phase.before + i)
    return out


def worth(planes: Floats, plan: Sequence[Phase], coefficients: dict[int, Floats | None]) -> bool:
    """Whether forecasts save more bits than their coefficients take, were all numbers Gaussian."""
    saved = 0.0
    for phase in plan:
        weights = coefficients[phase.before]
        if weights is None:
            continue
        here = planes[phase.before : phase.stop].reshape(len(weights), -1)
        left = here - weights @ planes[: phase.before].reshape(phase.before, -1) / 16
        energy = np.square(here, dtype=np.float64).sum(1) + 1, np.square(left, dtype=np.float64).sum(1) + 1
        saved += here.shape[1] / 2 * float(np.log2(energy[0] / energy[1]).sum())
    return saved > _BITS * sum(len(sources) for phase in plan for sources in phase.sources)


def _solved(products: NDArray[np.float64], sources: list[int], at: int) -> Floats:
    size = len(sources)
    system = np.concatenate([products[np.ix_(sources, sources)], products[sources, at][:, None]], 1)
    diagonal = np.arange(size)
    system[diagonal, diagonal] = system[diagonal, diagonal] * (1 + 1 / 512) + 1
    for i in range(size):
        system[i] /= system[i, i]
        others = system[:, i].copy()
        others[i] = 0
        system -= others[:, None] * system[i]
    weights = np.rint(16 * system[:, -1])
    return np.clip(weights, -LARGEST, LARGEST).astype(np.float32)
