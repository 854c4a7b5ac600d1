"""How far a classifier's outputs are from another's: Kullback-Leibler divergence of softened outputs.

Softened as in distillation (Hinton et al., arXiv:1503.02531), because on images that a network was trained on it is
certain, and what is certain says little about small errors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersenet.numerics.outputs import floats

TEMPERATURE = 4.0


def divergence(wanted: Any, found: Any, temperature: float = TEMPERATURE) -> float:
    """temperature^2 times the mean KL divergence in nats per sample, summed over the outputs of the model.

    Args:
        wanted: (N, ...) logits, or any nest of them; all numbers of a sample in one output make one distribution, and a
            single number is the logit of one class against another.
        found: the same shapes.

    >>> divergence(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
    0.0
    """
    return sum(_of_one(*pair, temperature) for pair in zip(floats(wanted), floats(found), strict=True))


def _of_one(wanted: Tensor, found: Tensor, temperature: float) -> float:
    p, q = (torch.log_softmax(_logits(outputs) / temperature, dim=1) for outputs in (wanted, found))
    return temperature**2 * float((p.exp() * (p - q)).sum(dim=1).mean().clamp(min=0.0))


def _logits(outputs: Tensor) -> Tensor:
    flat = outputs.detach().reshape(len(outputs), -1).double()
    return torch.cat([flat, torch.zeros_like(flat)], dim=1) if flat.shape[1] == 1 else flat
