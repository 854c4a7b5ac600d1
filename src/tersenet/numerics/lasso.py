"""The path of a LASSO: which terms of a sum matter, when few of them may be used.

He et al., "Channel pruning for accelerating very deep neural networks", arXiv:1707.06168, choose the inputs of a layer
by minimising 1/2 |y - sum of b_i x_i|^2 + strength sum |b_i| with growing strength. Departure: the path is walked from
the strength at which nothing is left downwards, and a term counts as much as the strength at which it comes in, so one
walk ranks all of them for every width. Coordinate descent as in Friedman et al. 2010, on the Gram matrix.
"""

from __future__ import annotations

import numpy as np


def lasso_entries(gram: np.ndarray, target: np.ndarray, steps: int = 60, least: float = 1e-4) -> np.ndarray:
    """For each term the largest strength at which the LASSO uses it, as a share of the one that lets nothing in.

    Args:
        gram: (n, n) x_i' x_j.
        target: (n,) x_i' y.
        steps: strengths on the path, in equal ratios; terms that come in at one step are told apart by |b_i|.
        least: the last strength; terms that stay out have 0.
    Returns:
        (n,) in [0, 1].
    Cost: O(steps n^2) times the sweeps that a step needs, about ten.

    >>> lasso_entries(np.diag([1.0, 1.0]), np.array([1.0, 0.5])).round(1)
    array([1. , 0.5])
    """
    count = len(target)
    top = float(np.abs(target).max(initial=0.0))
    entries, weights = np.zeros(count), np.zeros(count)
    if top == 0.0:
        return entries
    ratio = least ** (1 / (steps - 1))
    rest = target.astype(float).copy()  # x_i' (y - sum of b_j x_j)
    diagonal = np.maximum(np.diag(gram), 1e-12 * top)
    for step in range(steps):
        strength = top * ratio ** (step + 1)
        _descend(gram, diagonal, rest, weights, strength)
        new = (entries == 0) & (weights != 0)
        if new.any():  # within a step: the larger came in earlier
            place = np.abs(weights[new]) * np.sqrt(diagonal[new])
            entries[new] = ratio ** (step + 1 - place / place.max())
    return entries


def _descend(gram: np.ndarray, diagonal: np.ndarray, rest: np.ndarray, weights: np.ndarray, strength: float) -> None:
    """Coordinate descent for one strength, in place: all terms once, then those in use until they stand still."""
    active = np.arange(len(weights))
    for sweep in range(60):
        moved = 0.0
        for i in active:
            pull = rest[i] + diagonal[i] * weights[i]
            new = np.sign(pull) * max(0.0, abs(pull) - strength) / diagonal[i]
            if new != weights[i]:
                change = new - weights[i]
                rest -= gram[i] * change
                weights[i] = new
                moved = max(moved, abs(change) * diagonal[i])
        if moved < 1e-3 * strength:
            if sweep == 0 or len(active) == len(weights):
                return
            active = np.arange(len(weights))  # once more over all of them
        else:
            active = np.flatnonzero(weights)
