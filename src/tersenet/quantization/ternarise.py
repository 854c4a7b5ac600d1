"""Ternary weights: prepares a training in which weights are -1, 0 or +1 times scales.

Li, Zhang and Liu, "Ternary weight networks", arXiv:1605.04711 (twn); Zhu et al., "Trained ternary quantization",
arXiv:1612.01064 (ttq). Values and gradients are at the rules, bricks/weight_rules.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from tersenet.bricks.brick import Brick
from tersenet.bricks.few_bits import FewBitLayer, few_bit_kind
from tersenet.errors import ModelError, SettingsError
from tersenet.graph.outside_reads import used_outside
from tersenet.left_alone import LEFT_OUT, LeftAlone, by_layer
from tersenet.quantization.learned_graph import edges_of
from tersenet.quantization.quantize_aware import few_bit_twin
from tersenet.step import Plan, Step, replace
from tersenet.task import Task


@dataclass(frozen=True, kw_only=True)
class Ternarise(Step):
    """Prepares convolutions and linear layers for a training with ternary weights; `train` stands behind it.

    Activations stay float. After the training `settle` makes whole numbers of the weights of twn, and three values per
    layer of those of ttq, whose two scales are on no grid; files code both in under two bits a weight.

    Args:
        method: twn (one scale, threshold 0.7 mean |w|), twn_exact (the threshold of least squared error) or ttq (two
            scales per layer, trained).
        granularity: what shares threshold and scale in twn: "channel", or "tensor" as in the paper.
        edges: whether the first and the last layers stay "float", as in both papers, or are ternary as well ("same").
    """

    several_inputs: ClassVar[bool] = True
    family: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "prepares a training with ternary weights (TWN, TTQ)"
    serves: ClassVar[tuple[str, ...]] = ("conv", "linear")
    makes_layers: ClassVar[bool] = True

    method: Literal["twn", "twn_exact", "ttq"] = "twn"
    granularity: Literal["channel", "tensor"] = "channel"
    edges: Literal["float", "same"] = "float"

    def __post_init__(self) -> None:
        if self.method not in ("twn", "twn_exact", "ttq"):
            raise SettingsError(f"method must be twn, twn_exact or ttq, got {self.method!r}")
        if self.granularity not in ("channel", "tensor"):
            raise SettingsError(f"granularity must be channel or tensor, got {self.granularity!r}")
        if self.edges not in ("float", "same"):
            raise SettingsError(f"edges must be float or same, got {self.edges!r}")
        scales = "twn and twn_exact, since ttq has two scales for each layer"
        super().__post_init__(**({"granularity": scales} if self.method == "ttq" else {}))

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """{"layers": {path: scheme}}."""
        edges = edges_of(model, task.example) if self.edges == "float" else set()
        outside = used_outside(model, task.example)
        scheme = {"rule": self.method, "bits": 2, "granularity": self.granularity}
        found = {
            path: dict(scheme)
            for path, module in model.named_modules()
            if few_bit_kind(module) and self.matches(path, module) and path not in edges and path not in outside
        }
        return {"layers": found} if found else {}

    def left_alone(self, model: nn.Module, plan: Plan, task: Task) -> LeftAlone | None:
        outside = used_outside(model, task.example)

        def why(path: str, layer: nn.Module) -> str | None:
            if path in plan.get("layers", {}):
                return None
            if reason := no_few_bits(layer):
                return reason
            return outside.get(path, "are the first and last layers") if self.matches(path, layer) else LEFT_OUT

        return by_layer(model, why, EDGES if self.edges == "float" else "")

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Swaps the bricks in. Raises SettingsError when the plan is another model's."""
        layers = plan.get("layers", {})
        return replace(model, {path: few_bit_twin(model, path, scheme) for path, scheme in layers.items()})

    def fit(self, model: nn.Module, task: Task) -> None:
        """First scales, of least squared error. Raises ModelError on weights that are not finite."""
        start_layers(model, ("twn", "twn_exact", "ttq"))


EDGES = "edges: same takes the first and last layers, too"


def no_few_bits(layer: nn.Module) -> str | None:
    """Why a layer has no twin of few bits; None where it has one."""
    if few_bit_kind(layer) is not None:
        return None
    if isinstance(layer, Brick):
        return "are of few bits already"
    return f"have no twin of few bits ({type(layer).__name__}, or its padding)"


def start_layers(model: nn.Module, rules: tuple[str, ...]) -> None:
    """First numbers of the layers of some rules."""
    for path, layer in model.named_modules():
        if isinstance(layer, FewBitLayer) and layer.rule_name in rules:
            if not bool(layer.weight.isfinite().all()):
                raise ModelError(f"the weights of {path or 'the layer'} hold NaN or infinity; load finite weights")
            layer.start()
