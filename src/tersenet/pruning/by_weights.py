"""Importances of channels that need nothing but the weights; what each is, is in channel_scores.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersenet.graph.surgery import axes
from tersenet.numerics import channel_saliency as channels
from tersenet.numerics import saliency
from tersenet.pruning.subject import Ranked, Subject, by_score, parts_of, sums_of, weight_of


def sizes(subject: Subject, power: int) -> list[Ranked]:
    measure = saliency.l1 if power == 1 else saliency.l2
    cache: dict[str, Tensor | None] = {}

    def values(path: str) -> Tensor | None:
        if path not in cache:
            weight = weight_of(subject.model.get_submodule(path))
            cache[path] = None if weight is None else measure(weight)
        return cache[path]

    return [
        by_score(channels.class_magnitude(parts_of(subject, bundle, values), len(bundle.classes), power))
        for bundle in subject.bundles
    ]


def lamp(subject: Subject) -> list[Ranked]:
    return [by_score(saliency.lamp(torch.from_numpy(scores)).numpy()) for _, scores in sizes(subject, 2)]


def fpgm(subject: Subject) -> list[Ranked | None]:
    found: list[Ranked | None] = []
    for bundle in subject.bundles:
        parts = []
        for path, role in bundle.members:
            module: Any = subject.model.get_submodule(path)
            weight, axis = weight_of(module), axes(module)[role]
            if role == "out" and weight is not None and not axis.shared and axis.repeat == 1:
                owners = subject.known.slots[path, role]
                here = np.isin(owners, bundle.classes)
                filters = weight.movedim(axis.tensors["weight"], 0)[torch.from_numpy(here).to(weight.device)]
                places = np.searchsorted(bundle.classes, owners[here])
                parts.append((channels.distances(filters).cpu().numpy(), places))
        scores = channels.class_magnitude(parts, len(bundle.classes), 1)
        found.append(by_score(scores) if parts else None)
    return found


def batch_norm(subject: Subject) -> list[Ranked | None]:
    def values(path: str) -> Tensor | None:
        module: Any = subject.model.get_submodule(path)
        named = hasattr(module, "num_features") and getattr(module, "weight", None) is not None
        return saliency.l1(module.weight) if named else None

    found: list[Ranked | None] = []
    for bundle in subject.bundles:
        parts = parts_of(subject, bundle, values, ("channel",))
        count = max(1, len(parts))
        found.append(by_score(sums_of(parts, len(bundle.classes)) / count) if parts else None)
    return found


def random(subject: Subject) -> list[Ranked]:
    size = 1 + max(int(bundle.classes.max()) for bundle in subject.bundles)
    scores = channels.chance(size, subject.task.seed)
    return [by_score(scores[bundle.classes]) for bundle in subject.bundles]
