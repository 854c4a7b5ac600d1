"""`Repeat`: prune, retrain, prune, ... until a given drop in points of score; the last state within it is kept.

Iterative pruning as in Han et al., "Learning both weights and connections", arXiv:1506.02626, section 3.4; with a
`rewind` in each round the lottery tickets of Frankle & Carbin, arXiv:1803.03635. Departures: the number of rounds is
not set beforehand, and what ends them is measured on data that is not the test set.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tersenet.bricks.opened import copied
from tersenet.errors import DataError, NoEffect, SettingsError
from tersenet.graph.taken_apart import opened
from tersenet.left_alone import LeftAlone, listening, tell
from tersenet.named import remembering
from tersenet.numerics.scale import ACCURACY
from tersenet.step import Chain, Plan, Step
from tersenet.task import Task, score_model
from tersenet.unseen import unseen_batches


@dataclass(frozen=True, kw_only=True)
class Repeat(Step):
    """Runs its steps over and over on what they made, until a round loses too much; that round is thrown away.

    A step that removes a share of what is left takes that share of ever less: 20 % a round leave 0.8^n after n rounds.
    So does `prune_channels: {sparsity: 0.2}`. `prune_weights` counts its sparsity over all weights, those that are gone
    included; `prune_weights: {percentile: 20}` counts what is left. A round that takes nothing more away (the shapes
    and masks stay as they are) ends the repetition and is thrown away too.

    What is lost is counted against the model as it came into this step, in points, and judged by one of two things:

    - `task.validate`, where there is a held-out set: points of score lost on it.
    - Else agreement on unseen augmentations of the training images (the calibration images where there is no training
      data): the share of them whose most likely class is no longer the same, in points. Labels cannot serve, because a
      model is nearly always right on images that it was trained on. The points of score that can have been lost on
      these images are at most this many, so it stops early rather than late; it promises nothing about other images.

    With a folder in the task, trainings of rounds that are done are not repeated after a cut, and the one under way
    goes on inside its epochs; what does not train is computed again, and comes out the same.

    Args:
        steps: one round.
        until_drop: points that may be lost at most, 0 or more; None runs `at_most` rounds and judges nothing.
        at_most: rounds, at least 1.
        images: how many images judge the agreement; 2,000 tell half a point from a whole one.
    """

    several_inputs: ClassVar[bool] = True
    family: ClassVar[str] = "chain"
    summary: ClassVar[str] = "repeats its steps until a given drop in points of score, and keeps the last good round"
    serves: ClassVar[tuple[str, ...]] = ("what its steps serve",)
    chooses_layers: ClassVar[bool] = False

    steps: tuple[Step, ...] = ()
    until_drop: float | None = 0.5
    at_most: int = 10
    images: int = 2000

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        if not self.steps:
            raise SettingsError("repeat has no steps; give those of one round, such as prune_channels and train")
        if self.until_drop is not None and not 0 <= self.until_drop < math.inf:
            raise SettingsError(f"until_drop must be at least 0 points, got {self.until_drop}; 0.5 is half a point")
        for name in ("at_most", "images"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")
        super().__post_init__(**({"images": "until_drop"} if self.until_drop is None else {}))

    def data_needed(self) -> str:
        needs = {step.data_needed() for step in self.steps} | ({"inputs"} if self.until_drop is not None else set())
        return "labels" if "labels" in needs else "inputs" if "inputs" in needs else "nothing"

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """Each round is planned on what the ones before it made, so this runs them all on a copy."""
        return self.run(copied(model), task)[1]

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Replays the rounds that were kept, in order. Raises SettingsError when the plan is of other steps."""
        for entry in plan.get("rounds", []):
            model = Chain(steps=self.steps).apply(model, entry["plan"])
        return model

    def run(self, model: nn.Module, task: Task) -> tuple[nn.Module, Plan]:
        """The model after the last round within the drop, and
        {"judged_by": ..., "rounds": [{"plan": of the chain, "drop": points or None}], "ended_by": ...}.

        Warns `NoEffect` where not one round was kept; the model is then as it was.

        Raises:
            DataError: when there is nothing to judge by.
            SettingsError: when agreement cannot be told, because the outputs are no logits (N, classes).
        """
        model = opened(model, task.example)
        judged_by, lost = ("nothing", None) if self.until_drop is None else _judge(model, task, self.images)
        say = _sayer(task.quiet)
        start = model
        rounds: list[Plan] = []
        left: list[tuple[str, LeftAlone]] = []
        ended_by = f"{self.at_most} rounds were asked for"
        for number in range(1, self.at_most + 1):
            with warnings.catch_warnings(), remembering(self.steps, start), listening() as heard:
                if rounds:  # to find nothing more is how a repetition ends, and no news
                    warnings.simplefilter("ignore", NoEffect)
                candidate, plan = Chain(steps=self.steps).run(copy.deepcopy(model), task)
            if not plan or _same_shapes_and_masks(model, candidate):
                ended_by = f"round {number} took nothing more away"
                break
            drop = None if lost is None else round(lost(candidate), 6)  # 100 * (1 - 0.97) is above 3
            if drop is not None:
                text = (ACCURACY if task.validate is None else task.scale).loss_text(drop)
                say(f"round {number}: {text} lost of {self.until_drop}, judged by {judged_by}")
                if drop > self.until_drop:  # type: ignore[operator]
                    ended_by = f"round {number} lost {text}"
                    break
            model, left = candidate, heard
            rounds.append({"plan": plan, "drop": drop})
        if not rounds:
            warnings.warn(f"repeat left the model as it was: {ended_by}", NoEffect, stacklevel=2)
            return model, {}
        for name, found in left:
            tell(name, found)
        return model, {"judged_by": judged_by, "rounds": rounds, "ended_by": ended_by}


def _judge(model: nn.Module, task: Task, images: int) -> tuple[str, Callable[[nn.Module], float]]:
    """(what it is judged by, model -> points (or units of the metric) lost against `model` as it is now)."""
    if task.validate is not None:
        held_out = task.validate
        before = score_model(model, task, held_out).value
        lost = task.scale.lost
        return "score on the held-out set", lambda found: lost(before, score_model(found, task, held_out).value)
    data = task.train if task.train is not None else task.calibrate
    if data is None:
        raise DataError("repeat has nothing to judge by; give a held-out set (--validate DATA) or training data")
    reference = copy.deepcopy(model).eval()

    def agrees(outputs: Any, batch: Any) -> Tensor:
        """(N,) 1 where the most likely class is that of the reference."""
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or task.metric is not None:
            raise SettingsError(
                "repeat can tell agreement of logits (N, classes) under top-1 accuracy only; give a held-out set "
                "(--validate DATA) to be judged by"
            )
        return (outputs.argmax(1) == task.forward(reference, batch).argmax(1)).double()

    compared = dataclasses.replace(task, metric=agrees)

    def disagrees(found: nn.Module) -> float:
        return 100 * (1 - score_model(found, compared, unseen_batches(data, images, task.seed)).value)

    return "agreement on training images", disagrees


def _same_shapes_and_masks(before: nn.Module, after: nn.Module) -> bool:
    """Whether two models have the same layers, the same shapes, and the same values of what is true or false."""
    was, now = before.state_dict(), after.state_dict()
    # Kinds by name: a parametrized layer has a class of its own, and its copy another.
    kinds = [[(path, type(module).__name__) for path, module in model.named_modules()] for model in (before, after)]
    shapes = [[(key, value.shape, value.dtype) for key, value in state.items()] for state in (was, now)]
    return (
        kinds[0] == kinds[1]
        and shapes[0] == shapes[1]
        and all(torch.equal(was[key], value) for key, value in now.items() if value.dtype == torch.bool)
    )


def _sayer(quiet: bool) -> Callable[[str], None]:
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet, highlight=False)
    return lambda text: console.print(f"    {text}", soft_wrap=True)
