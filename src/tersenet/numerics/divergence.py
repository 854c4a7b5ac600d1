"""How far a classifier's outputs are from another's: Kullback-Leibler divergence of softened outputs.

Softened as in distillation (Hinton et al., arXiv:1503.02531), because on images that a network was trained on it is
certain, and what is certain says little about small errors.
"""

from __future__ import annotations

import torch
from torch import Tensor

TEMPERATURE = 4.0


def divergence(wanted: Tensor, found: Tensor, temperature: float = TEMPERATURE) -> float:
    """temperature^2 times the mean KL divergence in nats per sample.

    Args:
        wanted: (N, ...) logits; all numbers of a sample make one distribution.
        found: the same shape.

    >>> divergence(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
    0.0
    """
    p, q = (torch.log_softmax(outputs.detach().flatten(1).double() / temperature, dim=1) for outputs in (wanted, found))
    return temperature**2 * float((p.exp() * (p - q)).sum(dim=1).mean().clamp(min=0.0))
