"""From a budget to the picks that are best when measured: proposals of the solver, timed for real, the table corrected
where it was wrong (correction.py), and what is left compared with the original on images."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tersenet.numerics.divergence import divergence
from tersenet.progress import progressing
from tersenet.search.correction import corrected
from tersenet.search.costs import Costs, gone
from tersenet.search.sensitivity import Losses, digest_of, kept_row, outputs_of
from tersenet.search.sites import Picks, Site, configured, picks_key
from tersenet.search.solver import solve, uniform
from tersenet.step import Chain, Step
from tersenet.task import Task

_ROUNDS = 5
# Times that an aim is lowered where the same answer comes up again.
_AGAIN = 4
# A proposal this far under the budget leaves something unspent.
SLACK = 0.03


@dataclass
class Proposal:
    """One answer.

    Args:
        name: how it was found.
        picks: what it picks.
        predicted, cost: what it spends, predicted and measured, in the unit of the budget.
        loss: KL divergence from the original after repair, nats; None where there are no images.
    """

    name: str
    picks: Picks
    predicted: float
    cost: float
    loss: float | None = None

    def to_json(self, steps: Sequence[Step]) -> dict[str, Any]:
        """With how many places each step picked something at."""
        counts = {steps[index].name: len(places) for index, places in sorted(self.picks.items()) if places}
        return {
            "name": self.name, "predicted": self.predicted, "measured": self.cost, "divergence": self.loss,
            "places": counts,
        }  # fmt: skip


def propose(
    sites: Sequence[Site], costs: Costs, losses: Losses, budget: float, measured: Callable[[list[Picks]], list[float]]
) -> list[Proposal]:
    """Answers of several kinds, each solved again where measuring shows that its prediction missed the budget.

    Args:
        measured: the real costs of some picks.
    Returns:
        Distinct proposals; those that need not fit are in it too, for the report.
    """
    found: list[Proposal] = []
    seen = list(costs.seen)
    aims = {name: budget for name, _ in _kinds(sites, losses)}
    for _ in range(_ROUNDS):
        learned = corrected(costs, sites, seen)
        asked: list[tuple[str, Picks]] = []
        for name, weights in _kinds(sites, losses):
            picks = _new(sites, learned, weights, aims[name], found) if name in aims else None
            if picks is not None and all(picks != other for _, other in asked):
                asked.append((name, picks))
        if not asked:
            break
        costed = list(zip(asked, measured([picks for _, picks in asked]), strict=True))
        found += [Proposal(name, picks, learned.predict(picks, sites), cost) for (name, picks), cost in costed]
        seen += [(picks, cost) for (_, picks), cost in costed]
        learned = corrected(costs, sites, seen)
        for (name, picks), cost in costed:
            if budget * (1 - SLACK) <= cost <= budget:
                aims.pop(name)
            else:  # the next answer lies near this one, and so does what is left of its error
                aims[name] = budget * (1 - SLACK / 3) * learned.predict(picks, sites) / cost
    return found


def _new(
    sites: Sequence[Site], costs: Costs, losses: Losses | None, aim: float, found: Sequence[Proposal]
) -> Picks | None:
    """The best picks within the aim that were not measured yet; None where none come up. What comes up again missed the
    budget when it was measured, or is the answer already, so the aim is lowered a little."""
    for lower in range(_AGAIN):
        within = aim * (1 - SLACK / 2) ** lower
        picks = uniform(sites, costs, within) if losses is None else solve(sites, costs, losses, within)
        if picks is None or all(picks != each.picks for each in found):
            return picks
    return None


def _kinds(sites: Sequence[Site], losses: Losses) -> list[tuple[str, Losses | None]]:
    """Ways to weigh the losses. Roots of them count many small wounds higher than few deep ones, which training heals
    better; blocks alone and widths alone are what one would do by hand. None is the uniform policy."""

    def only(wide: bool) -> Losses:
        return {
            site.key: [
                value if i == 0 or (gone(site, len(site.settings) - 1) > 0) == wide else math.inf
                for i, value in enumerate(losses[site.key])
            ]
            for site in sites
        }

    roots = {key: [float(np.sqrt(value)) for value in row] for key, row in losses.items()}
    kinds: list[tuple[str, Losses | None]] = [("searched", losses), ("searched, roots", roots)]
    wide = [gone(site, len(site.settings) - 1) > 0 for site in sites]
    if any(wide) and not all(wide):
        kinds += [("blocks only", only(False)), ("widths only", only(True))]
    if any(wide):
        kinds.append(("uniform", None))
    return kinds


def compare(
    proposals: list[Proposal],
    steps: Sequence[Step],
    model: nn.Module,
    task: Task,
    images: torch.Tensor | None,
    sites: Sequence[Site],
    losses: Losses,
    folder: Path | None = None,
    original: torch.Tensor | None = None,
) -> None:
    """Fills in each proposal's loss: built, repaired, compared with the original; without images, the summed one.

    Args:
        images: of the size that the task has.
        folder: where results are kept, because building takes long; None keeps none.
        original: the same images as the original takes them; None where that is no other size.
    """
    if images is None:
        for each in proposals:
            each.loss = sum(
                losses[site.key][site.settings.index(each.picks.get(site.step, {}).get(site.place, site.settings[0]))]
                for site in sites
            )
        return
    # One half repairs, the other judges: what was fitted to images looks better on them than it is.
    half = len(images) // 2
    quiet, task = task.quiet, dataclasses.replace(task, calibrate=[images[:half]], train=None)
    original = images if original is None else original
    wanted = outputs_of(model, original[half:])
    digest = digest_of(steps, sites, model, images, original)
    with progressing("building candidates", len(proposals), not quiet) as advance:
        for each in proposals:

            def built(picks: Picks = each.picks) -> list[float]:
                changed = structure(steps, picks, sites, model, task)
                return [divergence(wanted, outputs_of(changed, images[half:]))]

            each.loss = kept_row(folder, f"{digest}-{picks_key(each.picks)}", built)[0]
            advance(1)


def structure(steps: Sequence[Step], picks: Picks, sites: Sequence[Site], model: nn.Module, task: Task) -> nn.Module:
    """The model with some picks, repaired and not trained; only the steps that pick are run."""
    searched = {site.step for site in sites}
    made = [step for index, step in enumerate(steps) if index in searched]
    own = {number: picks.get(index, {}) for number, index in enumerate(sorted(searched))}
    quiet = dataclasses.replace(task, test=None, quiet=True, original=model)
    return Chain(steps=tuple(configured(made, own))).run(copy.deepcopy(model), quiet)[0].eval()


def cheapest(sites: Sequence[Site], costs: Costs) -> Picks:
    """The picks with the least predicted cost, whatever they hurt."""
    free = {site.key: [0.0] * len(site.settings) for site in sites}
    low, high = 0.0, costs.predict({}, sites)
    best: Picks = {}
    for _ in range(12):
        middle = (low + high) / 2
        picks = solve(sites, costs, free, middle)
        if picks is None:
            low = middle
        else:
            best, high = picks, min(middle, costs.predict(picks, sites))
    return best
