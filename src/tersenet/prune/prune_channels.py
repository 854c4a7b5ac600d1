"""Takes whole channels out, with everything that is coupled to them.

Magnitude of filters: Li et al., arXiv:1608.08710. What is coupled: graph/coupling.py. Repair without training: least
squares (He et al., arXiv:1707.06168) and fresh norm statistics, in prune/repair.py. Departures: channels that pass
through a residual addition stay unless asked for, because one of them lives in every block of a stage.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from tersenet.errors import SettingsError
from tersenet.graph.costs import totals
from tersenet.graph.coupling import Bundle, coupling
from tersenet.graph.surgery import cut
from tersenet.prune.budget import rank, removed, sparsity_for
from tersenet.prune.repair import repair
from tersenet.step import Plan, Step
from tersenet.task import Task, batch_input


@dataclass(frozen=True, kw_only=True)
class PruneChannels(Step):
    """Removes the least important channels, in place. The outputs of the model, and so its head, keep their channels.

    Args:
        sparsity: share of the prunable channels to remove, 0 <= sparsity < 1. With scope "layer" of every bundle of
            coupled layers alike.
        importance: "l2" or "l1" magnitude of a channel's weights, or "random" as the control.
        multiple_of: keep numbers of channels that are multiples of this, rounded to the nearest, at least one
            multiple; bundles that are smaller stay whole. Runtimes like 8 or 16.
        scope: "layer" removes the same share everywhere; "global" the least important of the whole model.
        refit: repair the layers that lost inputs by least squares on calibration data, and measure the norms anew.
        macs: in place of `sparsity`, the share of multiply-adds to be left at most: the least sparsity that does.
        residual: also cut channels that pass through a residual addition.
        only: cut only channels that are made by layers which match.
        skip: cut no channel that is made by a layer which matches.
    """

    family: ClassVar[str] = "prune"
    summary: ClassVar[str] = "removes whole channels, with everything that is coupled to them"
    serves: ClassVar[tuple[str, ...]] = ("conv", "linear")

    sparsity: float = 0.5
    importance: str = "l2"
    multiple_of: int = 1
    scope: str = "layer"
    refit: bool = True
    macs: float | None = None
    residual: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise SettingsError(
                f"sparsity must lie in [0, 1), got {self.sparsity}; it is the share of channels removed"
            )
        if self.importance not in ("l1", "l2", "random"):
            raise SettingsError(f"importance must be one of l1, l2, random, got {self.importance!r}")
        if self.scope not in ("layer", "global"):
            raise SettingsError(f"scope must be layer or global, got {self.scope!r}")
        if self.multiple_of < 1:
            raise SettingsError(f"multiple_of must be at least 1, got {self.multiple_of}; 1 allows every number")
        if self.macs is not None and not 0 < self.macs <= 1:
            raise SettingsError(
                f"macs must lie in (0, 1], got {self.macs}; it is the share of multiply-adds to be left"
            )

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """{"kept": {layer path: {role: indices}}}; the roles are those of graph/surgery.py.

        Raises:
            SettingsError: when no sparsity leaves as few multiply-adds as `macs` asks for.
        """
        known = coupling(model, task.example)
        bundles = [bundle for bundle in known.bundles if self._serves(model, bundle)]
        if not bundles:
            return {}
        candidates = rank(model, known, bundles, self.importance, self.multiple_of, task.seed)
        sparsity = self.sparsity
        if self.macs is not None:
            total = totals(model, task.example).macs
            sparsity = sparsity_for(known, candidates, self.scope, self.macs, total)
            if sparsity > 1:
                hint = "" if self.residual else ", set residual: true"
                raise SettingsError(
                    f"macs {self.macs} cannot be reached by cutting channels; ask for more{hint} or skip less"
                )
        gone = removed(candidates, sparsity, self.scope)
        return {"kept": known.kept(gone)} if len(gone) else {}

    def _serves(self, model: nn.Module, bundle: Bundle) -> bool:
        makers = [path for path, role in bundle.members if role == "out"]
        wanted = all(self.matches(path, model.get_submodule(path)) for path in makers)
        return wanted and (self.residual or not bundle.residual)

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Raises SurgeryError when the plan is another model's; the model is then as it was."""
        return cut(model, plan["kept"]) if plan else model

    def fit(self, model: nn.Module, task: Task) -> None:
        """Repairs a freshly cut model on up to 512 calibration images; without such data it stays as it was cut.

        Least squares need the layers as they were, so they happen where `task.original` is the model before the cut,
        as in `run`; else only the norms are measured.
        """
        if not self.refit or (task.calibrate is None and task.train is None):
            return
        kept = None if task.original is None else self._kept(model, task.original, task)
        if kept == {}:
            return
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        images = torch.cat([batch_input(batch) for batch in task.calibration(1024)])[:1024].to(device)
        repair(model, images, None if kept is None else task.original, kept or {})

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
        return super().run(model, dataclasses.replace(task, original=copy.deepcopy(model)))
