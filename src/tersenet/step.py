"""The contract that every method keeps: `Step`, `Chain` and `Companion`.

`plan` decides and touches nothing, `apply` changes structure without data and without chance, `fit` changes numbers
and never structure. What `plan` returns is plain JSON, so a plan and a state dict are the whole compressed model.
A chain of steps is a step. The idea of a group of parts being a part is that of optax's `chain`.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from tersenet.bricks.opened import copied
from tersenet.bricks.plain import is_kind, is_plain
from tersenet.errors import NoEffect, SettingsError, TersenetError
from tersenet.graph.taken_apart import opened
from tersenet.left_alone import HEARD, LOG, SILENT, LeftAlone, tell
from tersenet.named import check_names, foresee_names, hits, is_layer, remembering
from tersenet.numerics.samples import Inputs
from tersenet.task import Task

Plan = dict[str, Any]


def snake_case(name: str) -> str:
    """`PruneChannels` -> `prune_channels`: a step's name in recipes and run folders."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


@dataclass(frozen=True, kw_only=True)
class Part:
    """What steps and companions share. A subclass is a frozen dataclass: its fields are the settings, and it holds
    nothing else."""

    summary: ClassVar[str] = ""
    chooses_layers: ClassVar[bool] = True  # whether it follows `only` and `skip`, where it has them
    naming: ClassVar[tuple[str, ...]] = ("only", "skip")  # settings that hold patterns

    def __post_init__(self, **idle: str) -> None:
        """Checks patterns, and refuses settings that would change nothing beside the others, since whoever sets one
        expects something of it.

        Args:
            idle: what a setting is for, for those that must stay at their defaults.
        Raises:
            SettingsError: naming the first that is wrong.
        """
        for name in ("only", "skip"):
            value = getattr(self, name, ())
            if isinstance(value, str) or not isinstance(value, Iterable) or not all(isinstance(p, str) for p in value):
                raise SettingsError(f"{name} must be a list of patterns, got {value!r}; write {name}: [{value}]")
            if value and not self.chooses_layers:
                raise SettingsError(
                    f"{name} is {list(value)!r}, but {self.name} takes the model as a whole; leave it out"
                )
            if hasattr(self, name):
                object.__setattr__(self, name, tuple(value))
        for each in fields(self) if idle else ():
            value = getattr(self, each.name)
            if each.name in idle and value != each.default:
                raise SettingsError(
                    f"{each.name} is {value!r}, which changes nothing here: it is for {idle[each.name]}; leave it out"
                )

    @property
    def name(self) -> str:
        return snake_case(type(self).__name__)

    def settings(self) -> dict[str, Any]:
        """The fields as they stand, in order of definition."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def names(self) -> dict[str, tuple[str, ...]]:
        """Setting -> the patterns in it, each of which must be about a layer of the model."""
        return {setting: tuple(getattr(self, setting, None) or ()) for setting in self.naming}

    def can_name(self, module: nn.Module) -> bool:
        """Whether the settings may be about this module; a pattern must be about one that they may. Most steps ask for
        layers: the path of what only holds layers is about none of them."""
        return is_layer(module)

    def matches(self, path: str, module: nn.Module) -> bool:
        """Whether `only` and `skip` leave this layer to it."""
        only, skip = getattr(self, "only", ()), getattr(self, "skip", ())
        return (not only or any(hits(p, path, module) for p in only)) and not any(hits(p, path, module) for p in skip)


@dataclass(frozen=True, kw_only=True)
class Step(Part):
    """One change to a model.

    Args:
        only: act only on layers that match one of these; empty means all.
        skip: leave layers that match one of these alone. A pattern is a layer's path ("layer1.0.conv1"), a path with
            wildcards ("layer1.*"), or a layer type ("linear", "Conv2d"). One that is about no layer is refused.
    """

    family: ClassVar[str] = ""
    serves: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[str] = "nothing"  # of the data: "nothing", "inputs" (unlabelled will do) or "labels"
    needs_trained: ClassVar[bool] = True
    special_runtime: ClassVar[bool] = False
    changes_structure: ClassVar[bool] = True
    several_inputs: ClassVar[bool] = False  # whether models of more inputs than one are served
    changes_task: ClassVar[bool] = False  # what follows has another task: `task_after`
    looks_back: ClassVar[bool] = False  # whether it has something to say of what it did to the outputs: `watch`
    makes_layers: ClassVar[bool] = False  # of paths or types that the model did not have

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def data_needed(self) -> str:
        """What this step needs of the data with these settings; most need what `needs` says."""
        return self.needs

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """Decides, and leaves the model as it was. JSON only; {} means that the structure stays."""
        return {}

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Changes structure, with no data and no chance. Use what it returns: the root itself may be replaced."""
        return model

    def fit(self, model: nn.Module, task: Task) -> None:
        """Changes numbers and never structure."""

    @property
    def tunable(self) -> bool:
        """Whether a search may choose for this step, with these settings; else it is part of every candidate."""
        return type(self).choices is not Step.choices

    def task_after(self, task: Task, plan: Plan) -> Task:
        """The task of what follows a step that was run with this plan; all but a few leave it as it is."""
        return task

    def check(self, task: Task) -> None:
        """Asked of every step, and of those it holds, before a search or the first step runs. Raises when something
        that the settings name, such as a teacher's file, cannot be had, or the step does not serve the model's
        inputs: hours later is late to hear of it."""
        self.check_inputs(task)
        for step in getattr(self, "steps", ()):
            step.check(task)

    def check_inputs(self, task: Task) -> None:
        """Raises SettingsError where the model takes several inputs and the step, or one that it holds, serves one."""
        if isinstance(task.example, tuple) and not self.several_inputs:
            raise SettingsError(
                f"the model takes {len(task.example)} inputs, and {self.name} serves models of one; leave it out"
            )
        for step in getattr(self, "steps", ()):
            step.check_inputs(task)

    def choices(self, model: nn.Module, task: Task) -> dict[str, list[Any]]:
        """place -> the settings that can be picked there, JSON only; the first leaves the place as it is.

        A place is a path in the model: of a layer, or of a module that holds the places below it. {} means that this
        step cannot be tuned place by place. Touches nothing.
        """
        return {}

    def sensitivities(self, model: nn.Module, task: Task, images: Inputs) -> dict[str, dict[Any, float]]:
        """place -> setting -> how much picking it there alone hurts, without training: the
        divergence (numerics/divergence.py) from the model's outputs, after repair. {} means that it is to be found by
        trying `chosen`.

        Args:
            images: (N, ...) unlabelled inputs, or a tuple of all inputs by order.
        """
        return {}

    def bits_of(self, setting: Any) -> int | None:
        """Bits of a stored weight at a setting of `choices` that changes nothing else; None for other settings."""
        return None

    def foretold_bytes(self, setting: Any, shape: tuple[int, ...], bits: int) -> float | None:
        """Bytes that a layer's weight takes once it is coded, at one of the settings of `choices`; None where a setting
        is no way to code, so that files say what it saves.

        Args:
            shape: of the weight; bits: of a number.
        """
        return None

    def chosen(self, picked: Mapping[str, Any]) -> Step | None:
        """This step with settings of `choices` picked at some places and nothing done at the others; None when nothing
        is left to do."""
        return self

    def wider(self) -> Step | None:
        """This step with more choices, for budgets that its ordinary ones do not reach; None when there are no more."""
        return None

    def left_alone(self, model: nn.Module, plan: Plan, task: Task) -> LeftAlone | None:
        """What this step could not touch with this plan, and why; None where there is nothing to be said.

        Args:
            model: as it was planned for, before `apply`.
        """
        return None

    def watch(self, model: nn.Module, task: Task) -> Callable[[nn.Module], None] | None:
        """Asked before anything is changed, where there is data: what is to be called with the finished model, and says
        what became of it; None where there is nothing to be said."""
        return None

    def run(self, model: nn.Module, task: Task) -> tuple[nn.Module, Plan]:
        """plan, apply and fit, on the model as every step wants it (graph/taken_apart.py).

        Says what was left alone (left_alone.py), and warns `NoEffect` when the step changes structure and found nothing
        to change.

        Raises:
            SettingsError: among others, when a setting names a layer that there is not.
        """
        listener = HEARD.get()
        try:
            if isinstance(task.example, tuple):
                self.check_inputs(task)
            if self.family != "train" and not all(map(is_plain, model.modules())):
                model = opened(model, task.example)
            if any(getattr(self, setting, None) for setting in (*self.naming, "companions")):
                for gone in check_names(self, model):
                    warnings.warn(gone, NoEffect, stacklevel=2)
            has_data = task.calibrate is not None or task.train is not None
            look_back = self.watch(model, task) if self.looks_back and has_data else None
            token = HEARD.set(SILENT)  # what a step only tries is not said
            try:
                plan = self.plan(model, task)
                if self.changes_structure and not plan:
                    warnings.warn(f"{self.name} matched no layer and left the model as it was", NoEffect, stacklevel=2)
                asked = isinstance(listener, list) or (listener is None and LOG.isEnabledFor(logging.INFO))
                left = self.left_alone(model, plan, task) if asked else None
                model = self.apply(model, plan)
                self.fit(model, task)
            finally:
                HEARD.reset(token)
            if left is not None:
                tell(self.name, left)
            if look_back is not None and plan:
                look_back(model)
        except TersenetError as error:
            # Said once, at the door: which step it was. The innermost step names itself, chains stay silent.
            if not getattr(error, "step", None):
                error.step = self.name  # type: ignore[attr-defined]
                error.args = (f"{self.name}: {error}", *error.args[1:])
            raise
        return model, plan


@dataclass(frozen=True, kw_only=True)
class Chain(Step):
    """Steps one after another. Its plan holds each step's plan, so replaying it replays all of them."""

    several_inputs: ClassVar[bool] = True
    family: ClassVar[str] = "chain"
    summary: ClassVar[str] = "runs its steps one after another"
    chooses_layers: ClassVar[bool] = False

    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "steps", tuple(self.steps))

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """Each step is planned on what the ones before it made, so this runs the chain on a copy."""
        return self.run(copied(model), task)[1]

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Replays the steps' plans in order. Raises SettingsError when the plan is another chain's."""
        plans = plan.get("steps", [])
        was, now = [entry["step"] for entry in plans], [step.name for step in self.steps]
        if plan and was != now:
            raise SettingsError(f"the plan is of {was}, the chain has {now}")
        for step, entry in zip(self.steps, plans, strict=False):
            model = step.apply(model, entry["plan"])
        return model

    def task_after(self, task: Task, plan: Plan) -> Task:
        for step, entry in zip(self.steps, plan.get("steps", []), strict=False):
            task = step.task_after(task, entry["plan"])
        return task

    def run(self, model: nn.Module, task: Task) -> tuple[nn.Module, Plan]:
        plans = []
        with remembering(self.steps, model):
            foresee_names(self.steps, model)
            for step in self.steps:
                model, plan = step.run(model, task)
                task = step.task_after(task, plan)
                plans.append({"step": step.name, "plan": plan})
        return model, {"steps": plans} if any(entry["plan"] for entry in plans) else {}


@dataclass(frozen=True, kw_only=True)
class Companion(Part):
    """Shapes a training run: an extra loss, a schedule. Given to Train or to any step that trains."""

    @property
    def trades(self) -> bool:
        """Whether it leads away from the original on purpose, such as for zeros; then a training may end below its
        start."""
        return False

    def opened(self, task: Task) -> Companion:
        """The companion with what it names opened, such as the files of teachers, so that a training is known by these
        and not by their names. Raises FileError and others when something cannot be had."""
        return self

    def placed(self, task: Task) -> Companion:
        """The companion for one training; one that keeps files puts them where the task keeps its own."""
        return self

    def loss(self, model: nn.Module, task: Task, batch: Any, outputs: Any) -> Tensor | float:
        """Added to the task's loss for one batch."""
        return 0.0

    def tick(self, model: nn.Module, progress: float) -> None:
        """Called before each batch with the share of the training that is done, 0 to 1."""


def layers(model: nn.Module, kinds: tuple[type[nn.Module], ...], step: Part | None = None) -> Iterator[tuple[str, Any]]:
    """The (path, module) pairs of some types that `step` is allowed to touch, in the model's order."""
    for path, module in model.named_modules():
        if is_kind(module, kinds) and (step is None or step.matches(path, module)):
            yield path, module


def replace(model: nn.Module, swaps: Mapping[str, nn.Module]) -> nn.Module:
    """Puts modules in place of others by path. The empty path is the root, so use what is returned."""
    for path, module in swaps.items():
        if path == "":
            model = module
            continue
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
        parts = path.split(".")
        for outer in (model.get_submodule(".".join(parts[:end])) for end in range(len(parts))):
            # In evaluation torch's transformer layers would not call it, but compute with its float weights themselves.
            if isinstance(outer, nn.TransformerEncoderLayer):
                outer.activation_relu_or_gelu = 0
            elif isinstance(outer, nn.TransformerEncoder):
                outer.use_nested_tensor = False
    return model
