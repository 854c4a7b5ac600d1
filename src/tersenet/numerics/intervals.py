"""Confidence intervals for scores and for timings.

Wilson's score interval: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
J. Am. Stat. Assoc. 22 (1927). Percentile bootstrap: B. Efron, "Bootstrap methods", Ann. Stat. 7 (1979).
"""

from __future__ import annotations

import math

import numpy as np


def wilson(hits: int, samples: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share of hits; z = 1.96 gives 95 %.

    >>> low, high = wilson(9173, 10000)
    >>> f"{low:.4f} {high:.4f}"
    '0.9117 0.9225'
    """
    if samples < 1 or not 0 <= hits <= samples:
        raise ValueError(f"hits must lie in 0..samples with samples >= 1, got {hits} of {samples}")
    share = hits / samples
    scale = 1 + z * z / samples
    centre = (share + z * z / (2 * samples)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_median(
    values: np.ndarray, resamples: int = 2000, seed: int = 0, level: float = 0.95, groups: int = 1
) -> tuple[float, float, float]:
    """Median of a sample with its percentile-bootstrap interval: (median, low, high).

    Args:
        values: (n,).
        groups: what lies together in so many equal, consecutive parts shares something, such as the process that it was
            measured in; then parts are drawn first and values within them second, and the interval holds for parts that
            were not seen. (Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8.)
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("the median of no values is not defined")
    if groups < 1 or values.size % groups:
        raise ValueError(f"{values.size} values cannot be cut into {groups} equal groups")
    size, random = values.size // groups, np.random.default_rng(seed)
    drawn = random.integers(0, groups, (resamples, groups, 1)) if groups > 1 else np.zeros((resamples, 1, 1), dtype=int)
    draws = drawn * size + random.integers(0, size, (resamples, groups, size))
    medians = np.median(values[draws.reshape(resamples, -1)], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(np.median(values)), float(low), float(high)
