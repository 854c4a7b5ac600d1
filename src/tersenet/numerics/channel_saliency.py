"""How much each channel matters: from slices of weights, from what it adds to the layers that read it.

Magnitude of filters: Li et al., "Pruning filters for efficient convnets", arXiv:1608.08710. Departure: a channel
lives in several layers at once (the filter that makes it, the norm that scales it, the kernels that read it), so its
magnitude is taken over all of them, as for the groups of DepGraph (Fang et al., arXiv:2301.12900).

- `distances`: geometric median, FPGM (He et al., arXiv:1811.00250);
- `greedy`: ThiNet (Luo et al., arXiv:1707.06342). Departure: on the Gram matrix of what the channels add, over all
  sampled outputs, where the paper takes one output of each sampled place;
- `first_order`: Molchanov et al., arXiv:1611.06440 (mean size over samples), with the gates of arXiv:1906.10771;
- `second_order`: Fisher pruning (Theis et al., arXiv:1801.05787);
- `weighted`: the sum of surveys, incoming |weights| beside |activations|.
LASSO selection is in lasso.py, elimination with compensation (ZipLM) in elimination.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tersenet.numerics.elimination import Reader


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


def relative(scores: np.ndarray) -> np.ndarray:
    """Divided by their mean, where that is above 0: 1 is the average of the layer."""
    mean = float(scores.mean()) if len(scores) else 0.0
    return scores / mean if mean > 0 else scores


def distances(filters: Tensor) -> Tensor:
    """(n,) sum of the Euclidean distances of a filter from all others; the nearest to the middle can be spared best.

    Args:
        filters: (n, ...).
    """
    rows = filters.detach().double().flatten(1)
    return torch.cdist(rows, rows).sum(dim=1)


def weighted(weights: np.ndarray, activations: np.ndarray, balance: float) -> np.ndarray:
    """balance * weights + (1 - balance) * activations, each divided by its mean over the layer first; all (n,).

    >>> weighted(np.array([1.0, 3.0]), np.array([10.0, 10.0]), balance=0.5)
    array([0.75, 1.25])
    """
    return balance * relative(weights) + (1 - balance) * relative(activations)


def first_order(gates: np.ndarray) -> np.ndarray:
    """(M, n) gradients of samples by gates -> (n,) mean |g|."""
    return np.abs(gates).mean(axis=0)


def second_order(gates: np.ndarray) -> np.ndarray:
    """(M, n) gradients of samples by gates -> (n,) mean g^2 / 2."""
    return 0.5 * np.square(gates).mean(axis=0)


def additions(reader: Reader) -> Tensor:
    """(n, n) Gram matrix of what channels add to the outputs of a layer: sum over outputs of (W_c x_c)(W_d x_d)."""
    weight = reader.weight.detach().double()
    products = reader.gram.detach().double() * (weight.T @ weight)  # (I, I)
    count, each = reader.groups.shape
    flat = reader.groups.flatten()
    return products[flat][:, flat].view(count, each, count, each).sum(dim=(1, 3))


def greedy(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Channels in the order in which they go, and the error once each is gone: always the least sum of what went.

    Args:
        gram: (n, n) of `additions`.
    Returns:
        (n,) order, the first to go comes first; (n,) squared error |sum of what went|^2 after each.
    """
    count = len(gram)
    alive, pull, error = np.ones(count, dtype=bool), np.zeros(count), 0.0
    order, errors = np.empty(count, dtype=np.int64), np.empty(count)
    for step in range(count):
        growth = np.where(alive, 2 * pull + np.diag(gram), np.inf)
        chosen = int(growth.argmin())
        error = max(0.0, error + float(growth[chosen]))
        alive[chosen] = False
        pull = pull + gram[chosen]
        order[step], errors[step] = chosen, error
    return order, errors


def chance(classes: int, seed: int) -> np.ndarray:
    """Scores that know nothing, the control for every other: (classes,) in [0, 1)."""
    return np.random.default_rng(seed).random(classes)
