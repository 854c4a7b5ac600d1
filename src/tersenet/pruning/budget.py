"""How many channels each bundle keeps, and which: shares, multiples, and a budget of multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersenet.errors import SettingsError
from tersenet.graph.coupling import Bundle, Coupling
from tersenet.graph.surgery import axes
from tersenet.pruning.channel_scores import ranked
from tersenet.pruning.subject import Subject


@dataclass(frozen=True)
class Candidate:
    """A bundle with its channels from the least important to the most.

    Args:
        name: path of the first layer that makes the bundle.
        bundle: the coupled channels.
        order: (n,) classes, least important first.
        scores: (n,) in that order, as channel_scores.py gives them.
        each: how many channels of that layer a class stands for; 1 but for grouped layers.
        unit: how many of its classes make a width that is a multiple of what was asked.
    """

    name: str
    bundle: Bundle
    order: np.ndarray
    scores: np.ndarray
    each: int
    unit: int

    @property
    def width(self) -> int:
        """Channels of the first layer that makes the bundle."""
        return len(self.order) * self.each

    def kept(self, wanted: float) -> int:
        """The allowed number of classes nearest to the wanted one: a multiple, at least one, at most all."""
        return min(len(self.order), max(1, math.floor(wanted / self.unit + 0.5)) * self.unit)

    def choices(self, multiple_of: int) -> list[int]:
        """Widths to choose from, the whole one first: by eighths, and by multiples of 4 at least."""
        grain = multiple_of if multiple_of > 1 else max(1, math.ceil(self.width / 32)) * 4
        grain = math.lcm(grain, self.each)
        return [self.width, *range((self.width - 1) // grain * grain, 0, -grain)]


def maker_of(bundle: Bundle) -> tuple[str, str]:
    """The slot of the first layer that makes a bundle, else of the first that carries it, or of a parameter."""
    slots = [slot for slot in (*bundle.members, *bundle.tensors) if slot[1] != "in"]
    return next((slot for slot in slots if slot[1] == "out"), slots[0])


def name_of(bundle: Bundle) -> str:
    """The path of `maker_of`."""
    return maker_of(bundle)[0]


def positions_of(known: Coupling, bundle: Bundle) -> dict[tuple[str, str], int]:
    """Slot -> how many of its channels one class of a bundle stands for."""
    return {
        slot: int(np.isin(known.slots[slot], bundle.classes).sum()) // len(bundle.classes)
        for slot in (*bundle.members, *bundle.tensors)
    }


def unit_of(positions: Mapping[tuple[str, str], int], multiple_of: int) -> int:
    """How many classes of a bundle make a width that is a multiple."""
    width = max(count for (_, role), count in positions.items() if role != "in")
    return multiple_of // math.gcd(multiple_of, max(width, 1))


def rank(subject: Subject, importance: str, multiple_of: int) -> list[Candidate]:
    """The bundles of a subject with their channels in order, by an importance of channel_scores.py."""
    found = []
    for bundle, (order, scores) in zip(subject.bundles, ranked(subject, importance), strict=True):
        name = name_of(bundle)
        positions = positions_of(subject.known, bundle)
        unit = unit_of(positions, multiple_of)
        maker = next(slot for slot in positions if slot[0] == name and slot[1] != "in")
        found.append(Candidate(name, bundle, bundle.classes[order], scores[order], max(1, positions[maker]), unit))
    return found


def shares(candidates: Sequence[Candidate], sparsity: float, scope: str) -> list[int]:
    """How many classes each bundle keeps when this share goes: of each alike, or the least important of all."""
    if sparsity == 0:
        return [len(candidate.order) for candidate in candidates]
    if scope == "layer":
        return [candidate.kept(len(candidate.order) * (1 - sparsity)) for candidate in candidates]
    every = np.sort(np.concatenate([candidate.scores for candidate in candidates]))
    bar = every[min(len(every) - 1, round(sparsity * len(every)))]
    return [candidate.kept(int((candidate.scores >= bar).sum())) for candidate in candidates]


def above(candidates: Sequence[Candidate], scope: str, percentile: float | None, threshold: float) -> list[int]:
    """How many classes each bundle keeps when everything below a score goes; at least one multiple.

    Args:
        percentile: the score is this percentile of the bundle's scores, or with scope "global" of all scores.
        threshold: the score itself where there is no percentile.
    """
    bars = [threshold] * len(candidates)
    if percentile is not None and scope == "global":
        bars = [float(np.percentile(np.concatenate([c.scores for c in candidates]), percentile))] * len(candidates)
    elif percentile is not None:
        bars = [float(np.percentile(candidate.scores, percentile)) for candidate in candidates]
    return [c.kept(int((c.scores >= bar).sum())) for c, bar in zip(candidates, bars, strict=True)]


def chosen_counts(candidates: Sequence[Candidate], widths: Mapping[str, int]) -> list[int]:
    """How many classes each bundle keeps when some have a given width.

    Raises:
        SettingsError: for a name or a width that there is not, listing those that there are.
    """
    known = {candidate.name: candidate for candidate in candidates}
    for name, width in widths.items():
        if name not in known:
            names = ", ".join(list(known)[:40]) + (" and more" if len(known) > 40 else "")
            raise SettingsError(f"widths names {name!r}, which makes no channels that can be cut; possible: {names}")
        each = known[name].each
        if width % each or not 1 <= width <= known[name].width:
            steps = f" in steps of {each}" if each > 1 else ""
            raise SettingsError(
                f"widths wants {width} channels of {name!r}; possible: {each} to {known[name].width}{steps}"
            )
    return [widths.get(candidate.name, candidate.width) // candidate.each for candidate in candidates]


def removed(candidates: Sequence[Candidate], counts: Sequence[int]) -> np.ndarray:
    """The classes that go when each bundle keeps so many."""
    gone = [c.order[: len(c.order) - count] for c, count in zip(candidates, counts, strict=True)]
    return np.concatenate(gone) if gone else np.zeros(0, dtype=np.int64)


class LayerMacs:
    """Multiply-adds for one sample, or parameters, as a function of how many classes each bundle keeps.

    Args:
        total: of the whole model; operators between its layers, norms and biases are in it and stay as they are.
        of: "macs" or "params", which a layer that is called twice holds once.
    """

    def __init__(self, known: Coupling, candidates: Sequence[Candidate], total: int, of: str = "macs") -> None:
        owner = np.full(1 + max(int(vector.max(initial=0)) for vector in known.slots.values()), len(candidates))
        self.sizes = np.array([len(candidate.order) for candidate in candidates])
        for i, candidate in enumerate(candidates):
            owner[candidate.bundle.classes] = i
        constants, inputs, outputs = [], [], []

        def spread(node: Any, dim: int) -> np.ndarray:
            """(bundles + 1,) channels per class of each bundle, and those that stay."""
            size, classes = node.meta["shape"][dim], known.states[node][dim]
            counts = np.zeros(len(candidates) + 1)
            if classes is None:
                counts[-1] = size
            else:
                counts += np.bincount(owner[classes], minlength=len(candidates) + 1)
            counts[:-1] /= self.sizes
            return counts

        alone = np.zeros(len(candidates) + 1)
        alone[-1] = 1.0
        seen: set[str] = set()
        for node in known.graph.graph.nodes:
            if node.op != "call_module" or (of == "params" and node.target in seen):
                continue
            seen.add(node.target)
            module: Any = known.graph.get_submodule(str(node.target))
            roles = axes(module)
            if not hasattr(module, "weight") or not ("out" in roles or hasattr(module, "out_channels")):
                continue
            source = node.args[0]
            if hasattr(module, "in_features"):
                constants.append(math.prod(node.meta["shape"][1:-1]) if of == "macs" else 1)
                inputs.append(spread(source, -1))
                outputs.append(spread(node, -1))
                continue
            depthwise = "channel" in roles
            where = source if getattr(module, "transposed", False) else node
            kernel = math.prod(module.kernel_size)
            places = math.prod(where.meta["shape"][2:]) if of == "macs" else 1
            constants.append(places * kernel / (1 if depthwise else module.groups))
            inputs.append(alone if depthwise else spread(source, 1))
            outputs.append(spread(node, 1))
        self.constants = np.array(constants, dtype=float)
        self.inputs = np.array(inputs).reshape(-1, len(candidates) + 1)
        self.outputs = np.array(outputs).reshape(-1, len(candidates) + 1)
        self.rest = 0.0
        self.rest = total - self.at(self.sizes)

    def at(self, counts: Sequence[int] | np.ndarray) -> float:
        """The count when the bundles keep so many classes."""
        kept = np.append(np.asarray(counts, dtype=float), 1.0)
        return self.rest + float(self.constants @ ((self.inputs @ kept) * (self.outputs @ kept)))


def sparsity_for(candidates: Sequence[Candidate], scope: str, budget: float, macs: LayerMacs) -> float:
    """The least sparsity whose network has at most so many multiply-adds; above 1 when none has."""

    def fits(sparsity: float) -> bool:
        return macs.at(shares(candidates, sparsity, scope)) <= budget

    low, high = 0.0, 1.0
    if fits(low):
        return low
    if not fits(high):
        return 2.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def cheapest(hurts: Sequence[Mapping[int, float]], budget: float, macs: LayerMacs) -> list[int] | None:
    """How many classes each bundle keeps, so that the sum of what hurts is small and the budget is kept; None if none.

    Greedy: from the whole network, always the step of one bundle to one of its smaller sizes that hurts least per
    multiply-add saved; with single steps on the lower convex hull this is the optimum but for the last step. Then
    bundles grow again where the budget allows it.

    Args:
        hurts: per bundle, number of classes kept -> what it costs; the largest is the whole bundle.
    """
    now = [max(curve) for curve in hurts]
    while (used := macs.at(now)) > budget:
        best: tuple[float, int, int] | None = None
        for i, curve in enumerate(hurts):
            for size, cost in curve.items():
                if size >= now[i]:
                    continue
                saved = used - macs.at([*now[:i], size, *now[i + 1 :]])
                slope = (cost - curve[now[i]]) / saved if saved > 0 else math.inf
                if best is None or slope < best[0]:
                    best = (slope, i, size)
        if best is None or best[0] == math.inf:
            return None
        now[best[1]] = best[2]
    return _grown(now, hurts, budget, macs)


def _grown(now: list[int], hurts: Sequence[Mapping[int, float]], budget: float, macs: LayerMacs) -> list[int]:
    """Gives back what fits, the largest gain first."""
    while True:
        gains = [
            (curve[now[i]] - cost, i, size)
            for i, curve in enumerate(hurts)
            for size, cost in curve.items()
            if size > now[i] and cost < curve[now[i]] and macs.at([*now[:i], size, *now[i + 1 :]]) <= budget
        ]
        if not gains:
            return now
        _, i, size = max(gains)
        now[i] = size
