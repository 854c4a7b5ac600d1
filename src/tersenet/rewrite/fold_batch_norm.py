"""Folds batch norms into the layers before them; the arithmetic is in graph/fold.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersenet.bricks.plain import is_kind, is_plain
from tersenet.graph.fold import fold, foldable_in, neutralize
from tersenet.left_alone import LEFT_OUT, LeftAlone, gathered
from tersenet.step import Plan, Step, replace
from tersenet.task import Task


@dataclass(frozen=True, kw_only=True)
class FoldBatchNorm(Step):
    """Folds each batch norm into the convolution or linear layer before it. Exact in evaluation.

    The norm becomes an `nn.Identity`, or does nothing where it also holds an activation; statistics are no longer
    updated, so train before it, or with them frozen.
    `only` and `skip` are about the layer that takes the norm over.
    """

    family: ClassVar[str] = "rewrite"
    summary: ClassVar[str] = "folds batch norms into the layers before them"
    serves: ClassVar[tuple[str, ...]] = ("conv", "linear")
    several_inputs: ClassVar[bool] = True

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """{"pairs": [[layer, norm], ...]}: paths, in the order of the forward."""
        here = dict(model.named_modules())
        pairs = [
            [layer, norm]
            for layer, norm in foldable_in(model, task.example)[0]
            if layer in here and norm in here and is_kind(here[layer], nn.Module) and self.matches(layer, here[layer])
        ]
        return {"pairs": pairs} if pairs else {}

    def left_alone(self, model: nn.Module, plan: Plan, task: Task) -> LeftAlone | None:
        norms = {path: norm.num_features for path, norm in model.named_modules() if isinstance(norm, _BatchNorm)}
        folded = {norm for _, norm in plan.get("pairs", [])}
        pairs, why = foldable_in(model, task.example)
        why |= {path: LEFT_OUT for _, path in pairs if path not in folded}
        unused = {path: "are not called" for path in norms if path not in folded}
        return gathered(norms, {**unused, **why}, of="channels of batch norms")

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        for layer, norm in plan.get("pairs", []):
            took = model.get_submodule(norm)
            fold(model.get_submodule(layer), took)
            if is_plain(took):
                replace(model, {norm: nn.Identity()})
            else:
                neutralize(took)
        return model
