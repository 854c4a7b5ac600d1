"""The learning rate as a function of the batches done, and the optimizer. Neither has a state that a cut could lose."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from tersenet.train.train import Train


def learning_rate(settings: Train, done: int, total: int) -> float:
    """The rate for the batch after `done` of `total` batches.

    Rises linearly to the peak over the first `warmup * total` batches, then stays, or falls as half a cosine:
    peak / 2 * (1 + cos(pi * t)), t = 0 to 1 over what is left.
    """
    warm = round(settings.warmup * total)
    if done < warm:
        return settings.learning_rate * (done + 1) / warm
    if settings.schedule == "constant":
        return settings.learning_rate
    return settings.learning_rate / 2 * (1 + math.cos(math.pi * (done - warm) / max(1, total - warm)))


def make_optimizer(settings: Train, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW; only weights with two or more dimensions decay."""
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate, beta = settings.learning_rate, settings.momentum
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=beta, nesterov=beta > 0)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=rate, betas=(beta, 0.999))
