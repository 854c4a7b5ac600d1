"""What importances of channels work on: the bundles of a model, and numbers of its weights per channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from tersenet.graph.coupling import Bundle, Coupling
from tersenet.graph.surgery import axes
from tersenet.numerics import channel_saliency as channels
from tersenet.task import Task

# (n,) places of the channels in the bundle, least important first, and (n,) their scores by place.
Ranked = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Subject:
    """What is scored.

    Args:
        balance: of "weighted": 1 counts weights only, 0 activations only.
    """

    model: nn.Module
    known: Coupling
    bundles: Sequence[Bundle]
    task: Task
    balance: float = 0.5


def readers(bundle: Bundle) -> list[str]:
    """Paths of the layers that read a bundle's channels."""
    return [path for path, role in bundle.members if role == "in"]


def by_score(scores: np.ndarray) -> Ranked:
    return np.argsort(scores, kind="stable"), scores


def in_order(order: Sequence[int] | np.ndarray, costs: np.ndarray) -> Ranked:
    """Costs in the order of removal -> scores by place; a channel that is kept matters no less than what went."""
    places, scores = np.asarray(order), np.empty(len(costs))
    scores[places] = np.maximum.accumulate(costs)
    return places, scores


def weight_of(module: Any) -> Tensor | None:
    """A layer's weight as numbers: the integers of a settled layer times their scale. None where it has none."""
    weight, scale = getattr(module, "weight", None), getattr(module, "weight_scale", None)
    if isinstance(weight, Tensor) and not weight.is_floating_point() and scale is not None:
        return weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
    return weight


def positions(module: nn.Module, role: str, values: Tensor | None) -> np.ndarray | None:
    """Numbers of the weight's shape, summed for each position of a slot; None where the slot has no weight."""
    axis = axes(module)[role]
    if values is None or "weight" not in axis.tensors:
        return None
    sums = channels.slices(values.detach().double().cpu(), axis.tensors["weight"]).numpy()
    if axis.shared:  # a slice holds the same place of every group
        sums = np.tile(sums / axis.groups, axis.groups)
    return sums.reshape(-1, axis.repeat).sum(axis=1)


def parts_of(
    subject: Subject, bundle: Bundle, values: Callable[[str], Tensor | None], roles: Sequence[str] | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per layer of a bundle: numbers of its positions, and the place of each one's channel in the bundle."""
    parts = []
    for path, role in bundle.members:
        if roles is None or role in roles:
            found = positions(subject.model.get_submodule(path), role, values(path))
            owners = subject.known.slots[path, role]
            here = np.isin(owners, bundle.classes)
            if found is not None:
                parts.append((found[here], np.searchsorted(bundle.classes, owners[here])))
    return parts


def sums_of(parts: Sequence[tuple[np.ndarray, np.ndarray]], count: int) -> np.ndarray:
    total = np.zeros(count)
    for values, owners in parts:
        np.add.at(total, owners, values)
    return total
