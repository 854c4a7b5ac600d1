"""What is chosen before anything else, because it changes the task: inputs of another size are another network to time.

Such choices are no terms of a sum, so each is searched on its own and the answers are compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tersenet.numerics.resizing import resized
from tersenet.search.sites import Picks
from tersenet.step import Step
from tersenet.task import Task


@dataclass(frozen=True)
class Situation:
    """One choice of what changes the task.

    Args:
        picks: of the steps that change it.
        task: as it is then.
        said: the picks in words; empty where the task stays.
    """

    picks: Picks
    task: Task
    said: str = ""

    def inputs(self, images: Tensor) -> Tensor:
        """Inputs (N, ...) of the original as they are then."""
        height, width = self.task.example.shape[2:] if self.picks else images.shape[2:]
        return resized(images, (int(height), int(width)))

    def shrunk(self, whole: Task) -> float:
        """Share of the inputs' numbers that is gone."""
        return 1 - math.prod(self.task.example.shape[1:]) / math.prod(whole.example.shape[1:])


def situations(steps: Sequence[Step], model: nn.Module, task: Task) -> list[Situation]:
    """Every combination of what the steps that change the task can pick; as it is comes first."""
    places = [
        (index, place, settings)
        for index, step in enumerate(steps)
        if step.changes_task
        for place, settings in step.choices(model, task).items()
    ]
    found = []
    for chosen in itertools.product(*(settings for *_, settings in places)):
        picks: Picks = {}
        for (index, place, settings), setting in zip(places, chosen, strict=True):
            if setting != settings[0]:
                picks.setdefault(index, {})[place] = setting
        there = task
        for index, at in picks.items():
            step = steps[index].chosen(at)
            if step is not None:
                there = step.task_after(there, step.plan(model, there))
        found.append(Situation(picks, there, ", ".join(f"{each}" for at in picks.values() for each in at.values())))
    return found
