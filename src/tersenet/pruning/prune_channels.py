"""Takes whole channels out, with everything that is coupled to them.

What is coupled: graph/coupling.py. What channels matter: pruning/channel_scores.py, which names the papers. Repair
without training: least squares (He et al., arXiv:1707.06168), in pruning/repair.py. Plans that are edited by hand:
pruning/edited.py. Departures: channels that pass through a residual addition stay unless asked for, because one of them
lives in every block of a stage.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from tersenet.errors import SettingsError
from tersenet.findings import tell
from tersenet.graph.costs import totals
from tersenet.graph.coupling import Bundle, Coupling
from tersenet.graph.recut import recut
from tersenet.graph.taken_apart import opened
from tersenet.left_alone import LEFT_OUT, LeftAlone, gathered, share_text
from tersenet.numerics.samples import Inputs, as_batch
from tersenet.progress import progressing
from tersenet.pruning.budget import (
    Candidate,
    LayerMacs,
    above,
    cheapest,
    chosen_counts,
    positions_of,
    rank,
    removed,
    shares,
    sparsity_for,
    unit_of,
)
from tersenet.pruning.by_data import CALIBRATION
from tersenet.pruning.channel_scores import FROM_WEIGHTS, SCORES
from tersenet.pruning.choose import scope_of
from tersenet.pruning.edited import cut_of, plan_of, removed_by
from tersenet.pruning.known import known_coupling
from tersenet.pruning.reconstruction import folded
from tersenet.pruning.repair import repair
from tersenet.pruning.sensitivity import compared, divergences
from tersenet.pruning.sound import NOTHING_TO_RECONSTRUCT_ON, UNDONE
from tersenet.pruning.standing import RESIDUAL, standing
from tersenet.pruning.subject import Subject
from tersenet.step import Plan, Step
from tersenet.task import Task

# 1,024 images in all, of which some only judge.
_CALIBRATION, _JUDGES = CALIBRATION, 256


@dataclass(frozen=True, kw_only=True)
class PruneChannels(Step):
    """Removes the least important channels, in place. The outputs of the model, and so its head, keep their channels.

    Args:
        sparsity: share of the prunable channels to remove, 0 <= sparsity < 1. With scope "layer" of every bundle of
            coupled layers alike.
        importance: "l2" or "l1" magnitude of a channel's weights; "reconstruction", the error that is left in the
            layers that read it once they make up for it, which needs calibration data; "random" as the control; and
            the others of pruning/channel_scores.py: lamp, fpgm, batch_norm, activation, zeros, weighted, product,
            gradient, taylor, fisher, obd, obs, thinet, lasso. Where one says nothing about a layer, "l2" serves.
        balance: of importance "weighted": 1 counts the weights only, 0 the activations only.
        multiple_of: keep numbers of channels that are multiples of this, rounded to the nearest, at least one
            multiple; bundles that are smaller stay whole. Runtimes like 8 or 16.
        scope: "layer" removes the same share everywhere; "global" the least important of the whole model; "auto" is
            global for lamp, which within one layer ranks as magnitudes do, else layer;
            "sensitivity" gives each bundle the width that keeps the sum of KL divergences small which the cuts cause
            one at a time; it needs `macs` or `params`, and calibration data.
        refit: repair the layers that lost inputs by least squares on calibration data, and measure the norms anew.
        macs: in place of `sparsity`, the share of multiply-adds to be left at most: the least sparsity that does.
        params: in place of `sparsity`, the share of parameters to be left at most.
        widths: in place of `sparsity` and budgets, the number of channels to keep by bundle, each named by the first
            layer that makes it ({"layer1.0.conv1": 8}); the others stay whole.
        percentile: in place of `sparsity`: every channel goes whose score lies under this percentile (0 to 100) of
            the scores of its bundle, or with scope "global" of all; at least one multiple stays.
        threshold: in place of `sparsity`: every channel goes whose score lies under this. Scores are relative to the
            layer's mean or absolute, as channel_scores.py says.
        keep: in place of all of these, the channels to keep by layer ({"layer1.0.conv1": [0, 2]}), as in a plan.
        residual: also cut channels that pass through a residual addition.
        only: cut only channels that are made by layers which match.
        skip: cut no channel that is made by a layer which matches.
    """

    family: ClassVar[str] = "prune"
    summary: ClassVar[str] = "removes whole channels, with everything that is coupled to them"
    serves: ClassVar[tuple[str, ...]] = ("conv", "linear")
    several_inputs: ClassVar[bool] = True
    naming: ClassVar[tuple[str, ...]] = ("only", "skip", "widths", "keep")

    sparsity: float = 0.5
    importance: str = "l2"
    multiple_of: int = 1
    scope: str = "auto"
    refit: bool = True
    macs: float | None = None
    residual: bool = False
    widths: Mapping[str, int] | None = None
    balance: float = 0.5
    percentile: float | None = None
    threshold: float | None = None
    keep: Mapping[str, Sequence[int]] | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise SettingsError(
                f"sparsity must lie in [0, 1), got {self.sparsity}; it is the share of channels removed"
            )
        if self.importance not in SCORES:
            raise SettingsError(f"importance must be one of {', '.join(SCORES)}, got {self.importance!r}")
        if self.scope not in ("auto", "layer", "global", "sensitivity"):
            raise SettingsError(f"scope must be auto, layer, global or sensitivity, got {self.scope!r}")
        if self.scope == "sensitivity" and self._budget is None and self.widths is None:
            raise SettingsError("scope is 'sensitivity', which needs a budget; set macs, such as macs: 0.5")
        if self.multiple_of < 1:
            raise SettingsError(f"multiple_of must be at least 1, got {self.multiple_of}; 1 allows every number")
        for name, what in (("macs", "multiply-adds"), ("params", "parameters")):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise SettingsError(f"{name} must lie in (0, 1], got {value}; it is the share of {what} to be left")
        if not 0 <= self.balance <= 1:
            raise SettingsError(f"balance must lie in [0, 1], got {self.balance}; 1 counts weights only")
        if self.percentile is not None and not 0 <= self.percentile < 100:
            raise SettingsError(f"percentile must lie in [0, 100), got {self.percentile}; what lies under it goes")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise SettingsError(f"threshold must be a finite number, got {self.threshold}; what lies under it goes")
        rivals = [name for name in ("macs", "params", "percentile", "threshold") if getattr(self, name) is not None]
        if len(rivals) > 1 and self.widths is None:
            raise SettingsError(f"{' and '.join(rivals)} each say how much to remove; give one of them")
        idle = {} if self.importance == "weighted" else {"balance": "importance: weighted"}
        if rivals and self.widths is None and self.keep is None:
            idle["sparsity"] = f"cuts without {rivals[0]}"
        if self.threshold is not None and self.scope == "global":
            raise SettingsError("scope is 'global', which changes nothing beside threshold, the same bar everywhere")
        super().__post_init__(**idle)
        if self.keep is not None:
            object.__setattr__(self, "keep", {path: list(places) for path, places in self.keep.items()})
        if self.widths is not None:
            wrong = [f"{key}: {value!r}" for key, value in self.widths.items() if type(value) is not int or value < 1]
            if wrong:
                raise SettingsError(f"widths must be whole numbers of at least 1 channel, got {wrong[0]}")
            object.__setattr__(self, "widths", dict(self.widths))

    def data_needed(self) -> str:
        if self.keep is not None:
            return self.needs
        return "inputs" if self.importance not in FROM_WEIGHTS or self.scope == "sensitivity" else self.needs

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """{"keep": {first layer of a bundle: indices}, "kept": {layer path: {role: indices}}, ...}.

        `keep` is for reading and editing, pruning/edited.py; `kept` is what follows, in roles of graph/surgery.py.

        Raises:
            SettingsError: when no sparsity leaves as few multiply-adds as `macs` asks for, or `widths` names what
                there is not.
            DataError: without calibration data, where the settings need it.
        """
        known = known_coupling(model, task.example)
        if self.keep is not None:
            return plan_of(model, known, removed_by(model, known, self.keep), task.example)
        bundles = self._bundles(model, known)
        if not bundles:
            if self.widths:
                raise SettingsError(f"widths names {next(iter(self.widths))!r}, but no channels can be cut here")
            return {}
        judged = self.scope == "sensitivity" and self.widths is None
        twin = folded(model, task.example) if judged else None
        candidates = self._ranked(model, known, bundles, task)
        if self.widths is not None:
            counts = chosen_counts(candidates, self.widths)
        elif self.percentile is not None or self.threshold is not None:
            counts = above(candidates, self._scope, self.percentile, self.threshold or 0.0)
        elif self._budget is None:
            counts = shares(candidates, self.sparsity, self._scope)
        else:
            counts = self._within(*self._budget, model, known, candidates, task, twin)
        return plan_of(model, known, removed(candidates, counts), task.example)

    def choices(self, model: nn.Module, task: Task) -> dict[str, list[Any]]:
        """Path of the first layer that makes a bundle -> numbers of channels, the whole one first.

        By eighths of the whole width, and by multiples of 4 at least; `multiple_of` above 1 is the grain instead.
        """
        known = known_coupling(model, task.example)
        bundles = self._bundles(model, known)
        subject = Subject(model, known, bundles, task)
        candidates = rank(subject, "random", self.multiple_of) if bundles else []
        found = {candidate.name: candidate.choices(self.multiple_of) for candidate in candidates}
        return {name: widths for name, widths in found.items() if len(widths) > 1}

    def sensitivities(self, model: nn.Module, task: Task, images: Inputs) -> dict[str, dict[Any, float]]:
        """name of a bundle -> width -> divergence (numerics/divergence.py) of the outputs when only this is cut.

        The layers that read the bundle make up for it; other repair is not counted.
        """
        known = known_coupling(model, task.example)
        bundles = self._bundles(model, known)
        if not bundles:
            return {}
        twin = folded(model, task.example)
        candidates = self._ranked(model, known, bundles, task)
        places = [candidate for candidate in candidates if len(candidate.choices(self.multiple_of)) > 1]
        return dict(zip([c.name for c in places], self._curves(model, known, places, task, twin, images), strict=True))

    def chosen(self, picked: Mapping[str, Any]) -> PruneChannels | None:
        return dataclasses.replace(self, widths=dict(picked)) if picked else None

    def wider(self) -> PruneChannels | None:
        """With the channels that pass through residual additions: one of them lives in every block of a stage, so that
        cutting it hurts more, and what it saves is harder to foretell."""
        return None if self.residual else dataclasses.replace(self, residual=True)

    @property
    def _scope(self) -> str:
        return scope_of(self.scope, self.importance)

    def _bundles(self, model: nn.Module, known: Coupling) -> list[Bundle]:
        return [bundle for bundle in known.bundles if self._serves(model, bundle)]

    def _serves(self, model: nn.Module, bundle: Bundle) -> bool:
        return self._wanted(model, bundle) and (self.residual or not bundle.residual)

    def _wanted(self, model: nn.Module, bundle: Bundle) -> bool:
        makers = [path for path, role in bundle.members if role == "out"]
        return all(self.matches(path, model.get_submodule(path)) for path in makers)

    def _ranked(self, model: nn.Module, known: Coupling, bundles: list[Bundle], task: Task) -> list[Candidate]:
        return rank(Subject(model, known, bundles, task, self.balance), self.importance, self.multiple_of)

    @property
    def _budget(self) -> tuple[str, float] | None:
        """What is counted, "macs" or "params", and the share of it to be left at most."""
        return next(((name, value) for name in ("macs", "params") if (value := getattr(self, name)) is not None), None)

    def _within(
        self,
        name: str,
        share: float,
        model: nn.Module,
        known: Coupling,
        candidates: list[Candidate],
        task: Task,
        twin: Any,
    ) -> list[int]:
        """How many classes each bundle keeps so that this share of the multiply-adds or parameters is left at most."""
        total = getattr(totals(model, task.example), name)
        macs = LayerMacs(known, candidates, total, name)
        counts: list[int] | None = None
        if self.scope == "sensitivity":
            if macs.at(macs.sizes) <= share * total:
                return [len(candidate.order) for candidate in candidates]
            judges = dataclasses.replace(task, calibrate=task.train or task.calibrate).inputs_like(model, _JUDGES)
            curves = self._curves(model, known, candidates, task, twin, judges)
            hurts = [
                {width // candidate.each: cost for width, cost in curve.items()}
                for candidate, curve in zip(candidates, curves, strict=True)
            ]
            counts = cheapest(hurts, share * total, macs)
        else:
            sparsity = sparsity_for(candidates, self._scope, share * total, macs)
            counts = shares(candidates, sparsity, self._scope) if sparsity <= 1 else None
        if counts is None:
            hint = "" if self.residual else ", set residual: true in a recipe"
            least = (
                ""
                if self.scope == "sensitivity"
                else (f": the least is {macs.at(shares(candidates, 1.0, self._scope)) / total:.2g}")
            )
            raise SettingsError(
                f"{name} {share} cannot be reached by cutting channels{least}; ask for more{hint} or skip less"
            )
        return counts

    def _curves(
        self, model: nn.Module, known: Coupling, candidates: list[Candidate], task: Task, twin: Any, images: Inputs
    ) -> list[dict[int, float]]:
        """Per candidate: width -> divergence."""
        bundles = [candidate.bundle for candidate in candidates]
        widths = [candidate.choices(self.multiple_of) for candidate in candidates]
        sizes = [[width // c.each for width in row[1:]] for row, c in zip(widths, candidates, strict=True)]
        orders = [np.searchsorted(c.bundle.classes, c.order).tolist() for c in candidates]
        calibration = task.inputs_like(model, _CALIBRATION)
        curves = []
        with progressing(f"sensitivities of {self.name}", len(candidates), not task.quiet) as advance:
            found = divergences(known, bundles, sizes, orders, twin, calibration, images, advance)
            for candidate, row, curve in zip(candidates, widths, found, strict=True):
                if curve is None:  # what is cut cannot be had by zeros, so it is cut
                    curve = {
                        width // candidate.each: self._tried(candidate.name, width, model, task, images)
                        for width in row[1:]
                    }
                    advance(1)
                curves.append({row[0]: 0.0, **{size * candidate.each: cost for size, cost in curve.items()}})
        return curves

    def _tried(self, name: str, width: int, model: nn.Module, task: Task, images: Inputs) -> float:
        step = dataclasses.replace(self, widths={name: width}, scope="layer")
        cut, _ = step.run(copy.deepcopy(model), dataclasses.replace(task, calibrate=[as_batch(images)]))
        return compared(model, cut, images)

    def left_alone(self, model: nn.Module, plan: Plan, task: Task) -> LeftAlone | None:
        known = known_coupling(model, task.example)
        named = self.keep if self.keep is not None else self.widths
        served = {id(bundle) for bundle in self._bundles(model, known)}

        def why(bundle: Bundle) -> str | None:
            if self.keep is not None or self.widths is not None:
                makers = {path for path, role in (*bundle.members, *bundle.tensors) if role != "in"}
                if makers & set(named or ()):
                    return None
                if self.keep is not None or id(bundle) in served:
                    return f"are not named in {'widths' if self.keep is None else 'keep'}"
            if id(bundle) not in served:
                return RESIDUAL if bundle.residual and self._wanted(model, bundle) else LEFT_OUT
            if unit_of(positions_of(known, bundle), self.multiple_of) >= len(bundle.classes):
                return f"have no smaller width that is a multiple of {self.multiple_of}"
            return None

        sizes, found = standing(model, known, why)
        held = sum(
            sizes[path] * share for path, parts in found.items() for reason, share in parts if reason == RESIDUAL
        )
        more = f"residual: true would allow {share_text(held / sum(sizes.values()))} more" if held else ""
        return gathered(sizes, found, advice=more)

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Raises SurgeryError when the plan is another model's or was edited into one that cannot be; the model is then
        as it was."""
        return recut(model, cut_of(model, plan)) if plan else model

    def fit(self, model: nn.Module, task: Task) -> None:
        """Repairs a freshly cut model on up to 768 calibration images; without such data it stays as it was cut.

        Least squares need the layers as they were, so they happen where `task.original` is the model before the cut,
        as in `run`; else only the norms are measured.
        """
        if not self.refit:
            return
        if not task.has_inputs:
            tell([NOTHING_TO_RECONSTRUCT_ON], task.quiet)
            return
        kept = None if task.original is None else self._kept(model, task.original, task)
        if kept == {}:
            return
        images = task.inputs_like(model, _CALIBRATION)
        if not repair(model, images, None if kept is None else task.original, kept or {}):
            tell([UNDONE], task.quiet)

    def _kept(self, model: nn.Module, original: nn.Module, task: Task) -> dict[str, dict[str, list[int]]] | None:
        """The cut that made this model from the original; None when it was not made so. Planning again finds it."""
        plan = self.plan(original, task)
        twin = self.apply(copy.deepcopy(original), plan).state_dict()
        state = model.state_dict()
        same = twin.keys() == state.keys() and all(
            torch.equal(twin[key].to(state[key].device), state[key]) for key in twin
        )
        return plan.get("kept", {}) if same else None

    def run(self, model: nn.Module, task: Task) -> tuple[nn.Module, Plan]:
        """plan, apply and fit, where the repair compares with the model as it comes in."""
        model = opened(model, task.example)
        task = dataclasses.replace(task, original=copy.deepcopy(model))
        return _Running(**self.settings()).run_once(model, task)


@dataclass(frozen=True, kw_only=True)
class _Running(PruneChannels):
    """The step while it runs: its repair is told what was planned, which would take long to find again."""

    planned: dict[str, Plan] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        return "prune_channels"

    def run_once(self, model: nn.Module, task: Task) -> tuple[nn.Module, Plan]:
        return Step.run(self, model, task)

    def plan(self, model: nn.Module, task: Task) -> Plan:
        self.planned["plan"] = super().plan(model, task)
        return self.planned["plan"]

    def _kept(self, model: nn.Module, original: nn.Module, task: Task) -> dict[str, dict[str, list[int]]]:
        return self.planned["plan"].get("kept", {})
