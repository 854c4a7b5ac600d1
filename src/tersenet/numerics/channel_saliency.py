"""How much each channel matters, from slices of weights.

Magnitude of filters: Li et al., "Pruning filters for efficient convnets", arXiv:1608.08710. Departure: a channel
lives in several layers at once (the filter that makes it, the norm that scales it, the kernels that read it), so its
magnitude is taken over all of them, as for the groups of DepGraph (Fang et al., arXiv:2301.12900).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def slices(values: Tensor, dim: int) -> Tensor:
    """Sum over each slice of a dimension: any shape, `dim` of size n -> (n,).

    >>> import torch
    >>> slices(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), dim=0)
    tensor([3., 3.])
    """
    return values.movedim(dim, 0).flatten(1).sum(dim=1) if values.dim() > 1 else values


def class_magnitude(parts: Sequence[tuple[np.ndarray, np.ndarray]], classes: int, power: int) -> np.ndarray:
    """(sum of |w|^power over all slices of a channel) ^ (1 / power), each layer first divided by its mean slice.

    Without the division the layer with the largest weights decides alone: kernels that read a channel are many times
    larger than the norm's scale, and say no more.

    Args:
        parts: per layer (magnitudes of its positions (n,), channel of each position (n,)).
        classes: channels are numbered 0..classes-1.
    Returns:
        (classes,) float64; 0 for channels that no part mentions.
    """
    sums = np.zeros(classes)
    for values, owners in parts:
        total = np.zeros(classes)
        np.add.at(total, owners, values)
        mean = total[np.unique(owners)].mean() if len(owners) else 0.0
        sums += total / mean if mean > 0 else 0.0
    return sums if power == 1 else np.sqrt(sums)


def chance(classes: int, seed: int) -> np.ndarray:
    """Scores that know nothing, the control for every other: (classes,) in [0, 1)."""
    return np.random.default_rng(seed).random(classes)
