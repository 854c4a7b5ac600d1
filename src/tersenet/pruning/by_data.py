"""Importances of channels that look at data; what each is, is in channel_scores.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.graph.coupling import Bundle
from tersenet.numerics import channel_saliency as channels
from tersenet.numerics import saliency
from tersenet.numerics.elimination import Reader, eliminate
from tersenet.numerics.lasso import lasso_entries
from tersenet.pruning.importance import activations, gate_gradients, weight_gradients
from tersenet.pruning.known import numbers_of, remembered, structure_of
from tersenet.pruning.reconstruction import folded, losses, readers_of
from tersenet.pruning.subject import Ranked, Subject, by_score, in_order, parts_of, readers, sums_of, weight_of

CALIBRATION = 768  # images for what layers lose


# --- from activations ----------------------------------------------------------------------------------------------


def _seen(subject: Subject, active: bool) -> list[np.ndarray | None]:
    """Per bundle what its readers see of each channel: mean size relative to the layer's, or share of non-zeros."""
    paths = sorted({path for bundle in subject.known.bundles for path in readers(bundle)})
    seen = activations(subject.model, subject.task, paths)
    found: list[np.ndarray | None] = []
    for bundle in subject.bundles:
        own = [path for path in readers(bundle) if path in seen.size]
        scores = np.zeros(len(bundle.classes))
        for path in own:
            owners = subject.known.slots[path, "in"]
            here = np.isin(owners, bundle.classes)
            places = np.searchsorted(bundle.classes, owners[here])
            values = (seen.active if active else seen.size)[path][here]
            mean = sums_of([(values, places)], len(scores)) / np.bincount(places, minlength=len(scores))
            scores += (mean if active else channels.relative(mean)) / len(own)
        found.append(scores if own else None)
    return found


def activation(subject: Subject) -> list[Ranked | None]:
    return [None if scores is None else by_score(scores) for scores in _seen(subject, active=False)]


def zeros(subject: Subject) -> list[Ranked | None]:
    return [None if scores is None else by_score(scores) for scores in _seen(subject, active=True)]


def _incoming(subject: Subject, bundle: Bundle) -> np.ndarray:
    """Sum of the |weights| of the filters that make each channel, in each layer relative to its mean."""

    def values(path: str) -> Tensor | None:
        weight = weight_of(subject.model.get_submodule(path))
        return None if weight is None else saliency.l1(weight)

    return channels.class_magnitude(parts_of(subject, bundle, values, ("out",)), len(bundle.classes), 1)


def weighted(subject: Subject) -> list[Ranked | None]:
    return [
        None if read is None else by_score(channels.weighted(_incoming(subject, bundle), read, subject.balance))
        for bundle, read in zip(subject.bundles, _seen(subject, active=False), strict=True)
    ]


def product(subject: Subject) -> list[Ranked | None]:
    return [
        None if read is None else by_score(channels.relative(_incoming(subject, bundle)) * read)
        for bundle, read in zip(subject.bundles, _seen(subject, active=False), strict=True)
    ]


# --- from gradients ------------------------------------------------------------------------------------------------


def _moments(subject: Subject) -> Mapping[str, Any]:
    paths = [
        path
        for path in sorted({path for bundle in subject.known.bundles for path, _ in bundle.members})
        if isinstance(getattr(subject.model.get_submodule(path), "weight", None), nn.Parameter)
    ]
    return weight_gradients(subject.model, subject.task, paths)


def gradient(subject: Subject) -> list[Ranked]:
    moments = _moments(subject)

    def values(path: str) -> Tensor | None:
        return saliency.gradient(moments[path].size) if path in moments else None

    return [
        by_score(channels.class_magnitude(parts_of(subject, bundle, values), len(bundle.classes), 1))
        for bundle in subject.bundles
    ]


def obd(subject: Subject) -> list[Ranked]:
    moments = _moments(subject)

    def values(path: str) -> Tensor | None:
        module: Any = subject.model.get_submodule(path)
        return saliency.fisher(module.weight, moments[path].square) if path in moments else None

    return [by_score(sums_of(parts_of(subject, bundle, values), len(bundle.classes))) for bundle in subject.bundles]


def _gated(subject: Subject, score: Callable[[np.ndarray], Ranked]) -> list[Ranked | None]:
    gates = gate_gradients(subject.model, subject.task, subject.known)
    columns = [gates[:, bundle.classes] for bundle in subject.bundles]
    return [score(found) if found.any() else None for found in columns]  # no layer reads them in a call of its own


def taylor(subject: Subject) -> list[Ranked | None]:
    return _gated(subject, lambda gates: by_score(channels.first_order(gates)))


def fisher(subject: Subject) -> list[Ranked | None]:
    return _gated(subject, lambda gates: by_score(channels.second_order(gates)))


def obs(subject: Subject) -> list[Ranked | None]:
    """Gates start at 1, their Hessian is the Fisher matrix of the bundle, and the gates that stay make up."""

    def score(gates: np.ndarray) -> Ranked:
        count = gates.shape[1]
        fisher = torch.from_numpy(gates.T @ gates / len(gates))
        reader = Reader(fisher, torch.ones(1, count, dtype=torch.float64), torch.arange(count)[:, None])
        found = eliminate([reader], ridge=1e-2)
        return in_order(found.order, 0.5 * np.diff(found.errors))

    return _gated(subject, score)


# --- from what the readers lose ------------------------------------------------------------------------------------


def _added(subject: Subject) -> list[tuple[np.ndarray, np.ndarray] | None]:
    """Per bundle the Gram matrix of what its channels add to all that read them, and the size of their weights."""
    images = subject.task.inputs_like(subject.model, CALIBRATION)
    found: list[tuple[np.ndarray, np.ndarray] | None] = []
    twin = folded(subject.model, subject.task.example)
    for maps in readers_of(subject.known, subject.bundles, twin, images):
        if maps is None:
            found.append(None)
            continue
        gram = torch.stack([channels.additions(reader) for reader in maps.values()]).sum(dim=0)
        weights = [(reader.weight.detach().double(), reader.groups) for reader in maps.values()]
        sizes = torch.stack([weight[:, groups].square().sum(dim=(0, 2)) for weight, groups in weights])
        found.append((gram.cpu().numpy(), sizes.sum(dim=0).sqrt().cpu().numpy()))
    return found


def thinet(subject: Subject) -> list[Ranked | None]:
    found: list[Ranked | None] = []
    for added in _added(subject):
        if added is None:
            found.append(None)
            continue
        order, errors = channels.greedy(added[0])
        found.append(in_order(order, np.diff(errors, prepend=0.0)))
    return found


def lasso(subject: Subject) -> list[Ranked | None]:
    """Terms are scaled to weights of size 1, as in the paper, so that a large weight is no cheap way in."""
    found: list[Ranked | None] = []
    for added in _added(subject):
        if added is None:
            found.append(None)
            continue
        gram, sizes = added
        sizes = np.where(sizes > 0, sizes, 1.0)
        found.append(by_score(lasso_entries(gram / np.outer(sizes, sizes), gram.sum(axis=1) / sizes)))
    return found


def reconstruction(subject: Subject) -> list[Ranked | None]:
    data = id(subject.task.calibrate if subject.task.calibrate is not None else subject.task.train)
    key = (
        structure_of(subject.model, subject.task.example), numbers_of(subject.model), data,
        tuple(int(bundle.classes[0]) for bundle in subject.bundles),
    )  # fmt: skip

    def make() -> list[Ranked | None]:
        images = subject.task.inputs_like(subject.model, CALIBRATION)
        found = losses(subject.known, subject.bundles, folded(subject.model, subject.task.example), images)
        return [None if lost is None else in_order(lost.found.order, np.diff(lost.found.errors)) for lost in found]

    return remembered(subject.model, "orders", key, make)
