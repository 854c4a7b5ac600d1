"""Holds weights on the grids that they are on while they train, so that a training after `shrink_file` keeps its bytes.

Rounding by what it hurts looks at layers one after another; a few epochs let all of them make up for it together. The
rounding is in every forward pass and gradients go straight through it, as in quantization-aware training (Jacob et al.,
arXiv:1712.05877); here the steps stay, because they are what the file was paid for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from tersenet.bricks.grid import grids, put_under
from tersenet.bricks.mask import at_most_masked, release
from tersenet.bricks.plain import is_kind
from tersenet.codec.values import grid_of
from tersenet.left_alone import LEFT_OUT, LeftAlone, another_kind, by_layer
from tersenet.step import Plan, Step
from tersenet.task import Task

_LEAST = 2  # numbers for each step: one is on a grid by itself


@dataclass(frozen=True, kw_only=True)
class KeepGrids(Step):
    """Weights and biases that are on grids, one step for each row or one for all, stay on them through a training.

    After `shrink_file`, or on a network from a .terse file. Zeros of weights stay zero, masks become zeros. What is on
    no grid trains as it is. `settle` comes after the training. Adam suits it, since what learns are numbers of steps:
    at a rate of 0.002 a number that is always pulled the same way is another one after 250 batches.
    """

    several_inputs: ClassVar[bool] = True
    family: ClassVar[str] = "size"
    summary: ClassVar[str] = "keeps weights on the grids of shrink_file while they train"
    serves: ClassVar[tuple[str, ...]] = ("conv", "linear")

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """{"grids": {path: {name of a tensor: whether each row has a step of its own}}}"""
        found: dict[str, dict[str, bool]] = {}
        for path, layer in model.named_modules():
            if is_kind(layer, _ConvNd | nn.Linear) and self.matches(path, layer) and at_most_masked(layer):
                rows = {name: _has_rows(getattr(layer, name)) for name in ("weight", "bias")}
                on = {name: each for name, each in rows.items() if each is not None}
                found |= {path: on} if on else {}
        return {"grids": found} if found else {}

    def left_alone(self, model: nn.Module, plan: Plan, task: Task) -> LeftAlone | None:
        def why(path: str, layer: nn.Module) -> str | None:
            if "weight" in plan.get("grids", {}).get(path, {}):
                return None
            if not isinstance(layer, _ConvNd | nn.Linear):
                return another_kind(layer)
            return "are on no grid" if self.matches(path, layer) else LEFT_OUT

        return by_layer(model, why)

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        for path, entry in plan.get("grids", {}).items():
            layer: Any = model.get_submodule(path)
            if parametrize.is_parametrized(layer, "weight"):
                release(layer)
            for name, rows in entry.items():
                put_under(layer, name, rows)
        return model

    def fit(self, model: nn.Module, task: Task) -> None:
        """Reads the steps and the zeros off the numbers."""
        for path, layer, name, grid in grids(model):
            if not self.matches(path, layer) or bool(grid.step.any()):
                continue
            value = layer.parametrizations[name].original.detach()
            steps = _steps(value, grid.rows)
            if steps is None:
                continue
            grid.step.copy_(torch.from_numpy(steps).view(grid.step.shape))
            if name == "weight":
                grid.kept.copy_(value != 0)
            with torch.no_grad():
                setattr(layer, name, value)


def _has_rows(value: Tensor | None) -> bool | None:
    """Whether a tensor is on a grid of each row (true) or on one of all (false); None where on neither."""
    if value is None or not value.is_floating_point():
        return None
    for rows in (True, False):  # steps of rows may have a common part, which is far finer than they are
        enough = value.numel() >= _LEAST * (max(1, len(value)) if rows else 1)
        if enough and (value.dim() > 1 or not rows) and _steps(value, rows) is not None:
            return rows
    return None


def _steps(value: Tensor, rows: bool) -> NDArray[np.float32] | None:
    """(O,) or (1,) steps, 1 for zeros alone; None where some row is on no grid."""
    numbers = value.detach().float().cpu().numpy() + np.float32(0)  # no -0.0, which is on no grid
    parts = numbers.reshape(len(numbers) if rows else 1, -1)
    found = [grid_of(part) for part in parts]
    known = [each[0] for each in found if each is not None]
    return np.array(known, np.float32) if len(known) == len(found) else None
