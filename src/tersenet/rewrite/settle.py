"""Makes masks and rounding permanent, at the end of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from tersenet.bricks.settle import attached, settle
from tersenet.step import Plan, Step
from tersenet.task import Task


@dataclass(frozen=True, kw_only=True)
class Settle(Step):
    """Makes masks and rounding permanent. Outputs stay equal; what is settled can no longer be trained.

    A model is settled as a whole: `only` and `skip` are refused.
    """

    family: ClassVar[str] = "settle"
    summary: ClassVar[str] = "makes masks and rounding permanent"
    serves: ClassVar[tuple[str, ...]] = ("any layer with a mask or rounding",)
    several_inputs: ClassVar[bool] = True
    chooses_layers: ClassVar[bool] = False
    makes_layers: ClassVar[bool] = True

    def plan(self, model: nn.Module, task: Task) -> Plan:
        found = attached(model)
        return {"attached": found} if found else {}

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        return settle(model) if plan else model
