"""How many channels each bundle keeps, and which: shares, multiples, and a budget of multiply-adds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from tersenet.graph.coupling import Bundle, Coupling
from tersenet.graph.surgery import axes
from tersenet.numerics.saliency import chance, class_magnitude, magnitude


@dataclass(frozen=True)
class Candidate:
    """A bundle with its channels from the least important to the most.

    Args:
        bundle: the coupled channels.
        order: (n,) classes, least important first.
        scores: (n,) in that order, their mean over the bundle is 1.
        unit: how many of its channels make a width that is a multiple of what was asked.
    """

    bundle: Bundle
    order: np.ndarray
    scores: np.ndarray
    unit: int

    def kept(self, wanted: float) -> int:
        """The allowed number of channels nearest to the wanted one: a multiple, at least one, at most all."""
        return min(len(self.order), max(1, math.floor(wanted / self.unit + 0.5)) * self.unit)


def rank(
    model: nn.Module, known: Coupling, bundles: list[Bundle], importance: str, multiple_of: int, seed: int
) -> list[Candidate]:
    """Scores the channels of some bundles by "l1" or "l2" magnitude, or at "random"."""
    size = 1 + max(int(bundle.classes.max()) for bundle in bundles)
    found = []
    power = 1 if importance == "l1" else 2
    random = chance(size, seed)
    slices = (
        {}
        if importance == "random"
        else {
            slot: _slices(model.get_submodule(slot[0]), slot[1], power)
            for slot in {slot for bundle in bundles for slot in bundle.members}
        }
    )
    for bundle in bundles:
        if importance == "random":
            scores = random[bundle.classes]
        else:
            parts = []
            for slot in bundle.members:
                classes = known.slots[slot]
                here = np.isin(classes, bundle.classes)
                if slots := slices[slot]:
                    parts.append((slots[0][here], np.searchsorted(bundle.classes, classes[here])))
            scores = class_magnitude(parts, len(bundle.classes), power)
        order = np.argsort(scores, kind="stable")
        scores = scores / scores.mean() if scores.mean() > 0 else scores
        width = max(
            int(np.isin(known.slots[slot], bundle.classes).sum()) // len(bundle.classes)
            for slot in bundle.members
            if slot[1] in ("out", "channel")
        )
        found.append(
            Candidate(bundle, bundle.classes[order], scores[order], multiple_of // math.gcd(multiple_of, max(width, 1)))
        )
    return found


def _slices(module: nn.Module, role: str, power: int) -> list[np.ndarray]:
    """Magnitude of the weights of each position of a slot, in a list; empty where the slot has none."""
    axis = axes(module)[role]
    weight: Any = getattr(module, "weight", None)
    if weight is None or "weight" not in axis.tensors:
        return []
    scale: Any = getattr(module, "weight_scale", None)
    if not weight.is_floating_point() and scale is not None:  # integers of a settled layer, with a scale per output
        weight = weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
    values = magnitude(weight.cpu(), axis.tensors["weight"], power).numpy()
    if axis.shared:  # a slice holds the same place of every group
        values = np.tile(values / axis.groups, axis.groups)
    return [values.reshape(-1, axis.repeat).sum(axis=1)]


def removed(candidates: list[Candidate], sparsity: float, scope: str) -> np.ndarray:
    """The classes that go when this share of the channels does: of each bundle alike, or the least important of all."""
    if scope == "layer":
        counts = [candidate.kept(len(candidate.order) * (1 - sparsity)) for candidate in candidates]
    else:
        every = np.sort(np.concatenate([candidate.scores for candidate in candidates]))
        bar = every[min(len(every) - 1, round(sparsity * len(every)))]
        counts = [candidate.kept(int((candidate.scores >= bar).sum())) for candidate in candidates]
    if sparsity == 0:
        counts = [len(candidate.order) for candidate in candidates]
    return np.concatenate(
        [candidate.order[: len(candidate.order) - count] for candidate, count in zip(candidates, counts, strict=True)]
    )


def layer_macs(known: Coupling, gone: np.ndarray) -> int:
    """Multiply-adds of the convolutions and linear layers for one sample, once these classes are gone."""
    total = 0
    for node in known.graph.graph.nodes:
        if node.op != "call_module":
            continue
        module: Any = known.graph.get_submodule(str(node.target))
        roles = axes(module)
        if not hasattr(module, "weight") or not ("out" in roles or hasattr(module, "out_channels")):
            continue
        source = node.args[0]
        inputs, outputs = known.shape(source, gone), known.shape(node, gone)
        if hasattr(module, "in_features"):
            total += math.prod(outputs[1:]) * inputs[-1]
            continue
        groups = inputs[1] if "channel" in roles else module.groups
        kernel = math.prod(module.kernel_size)
        where = inputs if getattr(module, "transposed", False) else outputs
        total += math.prod(where[2:]) * inputs[1] * outputs[1] // groups * kernel
    return total


def sparsity_for(known: Coupling, candidates: list[Candidate], scope: str, macs: float, total: int) -> float:
    """The least sparsity whose network has at most `macs` of all multiply-adds; above 1 when none has.

    Args:
        total: multiply-adds of the whole model, operators between its layers included, which stay as they are.
    """
    nothing = np.zeros(0, dtype=np.int64)
    rest = total - layer_macs(known, nothing)

    def fits(sparsity: float) -> bool:
        return rest + layer_macs(known, removed(candidates, sparsity, scope)) <= macs * total

    low, high = 0.0, 1.0
    if fits(low):
        return low
    if not fits(high):
        return 2.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
