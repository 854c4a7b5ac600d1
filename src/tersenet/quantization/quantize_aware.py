"""Quantization during training: layers and activations of 2 to 8 bits whose grids are trained with the weights.

Esser et al., "Learned step size quantization", arXiv:1902.08153 (lsq); Zhou et al., "DoReFa-Net", arXiv:1606.06160;
Choi et al., "PACT", arXiv:1805.06085. Formulas and gradients are at the rules (bricks/weight_rules.py) and at
bricks/learned_quantizer.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from tersenet.bricks.few_bits import FewBitLayer, few_bit_kind
from tersenet.bricks.weight_rules import RULES
from tersenet.errors import SettingsError
from tersenet.graph.outside_reads import used_outside
from tersenet.left_alone import LEFT_OUT, LeftAlone, by_layer
from tersenet.step import Plan, Step, replace
from tersenet.task import Task

# Method -> rule of the weights, method of the activations. PACT is about activations; its weights are DoReFa's.
METHODS = {"lsq": ("lsq", "lsq"), "dorefa": ("dorefa", "dorefa"), "pact": ("dorefa", "pact")}


@dataclass(frozen=True, kw_only=True)
class QuantizeAware(Step):
    """Prepares a model for a training in few bits; `train` stands behind it.

    Norms stay in the model, between a layer and the rounding of its output, and learn in the training. Afterwards
    `fold_batch_norm` moves each into its layer's scales per channel, exactly, and `settle` makes whole numbers of the
    weights; exporting does both on a copy. What is exported runs in integers: activations of fewer than 8 bits stand on
    an 8-bit grid whose upper part is clipped off, additions and the inputs of edges have 8 bits.

    Args:
        weights: int2 to int8 (dorefa and pact: to int7), of all layers but the edges.
        activations: int2 to int8, of what these layers read; None leaves activations, and the graph, as they are.
        method: lsq, dorefa or pact.
        edges: of the first and the last layers, weights and inputs: int8, "same" as the others, or "float".
        granularity: what shares a step of the weights (lsq): "channel", or "tensor" as in the paper.
        samples: how many calibration samples choose the first ranges.
    """

    several_inputs: ClassVar[bool] = True
    family: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "prepares a training in 2 to 8 bits, with learned step sizes"
    serves: ClassVar[tuple[str, ...]] = ("conv", "linear")
    needs: ClassVar[str] = "inputs"
    makes_layers: ClassVar[bool] = True

    weights: str = "int4"
    activations: str | None = "int4"
    method: Literal["lsq", "dorefa", "pact"] = "lsq"
    edges: str = "int8"
    granularity: Literal["channel", "tensor"] = "channel"
    samples: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise SettingsError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.granularity not in ("channel", "tensor"):
            raise SettingsError(f"granularity must be channel or tensor, got {self.granularity!r}")
        most = RULES[METHODS[self.method][0]].most_bits
        _check("weights", self.weights, most, "" if most == 8 else f" with {self.method}")
        if self.activations is not None:
            _check("activations", self.activations, 8, ", or null for weights only")
        if self.edges not in ("int8", "same", "float"):
            raise SettingsError(f"edges must be int8, same or float, got {self.edges!r}")
        if self.samples < 1:
            raise SettingsError(f"samples must be at least 1, got {self.samples}")

    def data_needed(self) -> str:
        return "nothing" if self.activations is None else "inputs"

    def scheme(self, edge: bool) -> dict[str, object]:
        """Of one layer: the rule and bits of its weights, and the bits of what it reads."""
        rule = METHODS[self.method][0]
        bits, reads = int(self.weights[3:]), 8 if self.activations is None else int(self.activations[3:])
        if edge and self.edges == "int8":
            rule, bits, reads = "lsq", 8, 8
        return {"rule": rule, "bits": bits, "granularity": self.granularity, "reads": reads}

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """{"layers": {path: scheme}}, and with activations what `quantization/learned_graph.py` says."""
        from tersenet.quantization.learned_graph import edges_of, plan_graph

        if self.activations is not None:
            return plan_graph(model, task.example, self)
        edges, outside = edges_of(model, task.example), used_outside(model, task.example)
        found = {}
        for path, module in model.named_modules():
            if path in outside or not few_bit_kind(module) or not self.matches(path, module):
                continue
            if not (path in edges and self.edges == "float"):
                found[path] = self.scheme(path in edges)
        return {"layers": found} if found else {}

    def left_alone(self, model: nn.Module, plan: Plan, task: Task) -> LeftAlone | None:
        outside = used_outside(model, task.example) if self.activations is None else {}

        def why(path: str, layer: nn.Module) -> str | None:
            if path in plan.get("layers", {}):
                return None
            if path in plan.get("float", {}):
                return f"stay float: {plan['float'][path]}"
            if few_bit_kind(layer) is None:
                return f"have no twin of few bits ({type(layer).__name__}, or its padding)"
            if not self.matches(path, layer):
                return LEFT_OUT
            return outside.get(path, "are the first and last layers")

        return by_layer(model, why, "edges: same takes the first and last layers, too" if self.edges == "float" else "")

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Swaps the bricks in. Until `fit` has run (or a state dict is loaded) their numbers are placeholders."""
        if not plan:
            return model
        if "input" in plan:
            from tersenet.quantization.learned_graph import apply_graph

            return apply_graph(model, plan)
        return replace(model, {path: few_bit_twin(model, path, scheme) for path, scheme in plan["layers"].items()})

    def fit(self, model: nn.Module, task: Task) -> None:
        """First steps of the weights by least squared error, first ranges of activations from calibration data.

        Raises:
            DataError: when there is no calibration data, or it holds values that are not finite.
            ModelError: when weights or activations are not finite.
        """
        from tersenet.quantization.learned_ranges import start

        start(model, task, self.samples)


def few_bit_twin(model: nn.Module, path: str, scheme: Plan) -> FewBitLayer:
    """The brick for a layer. Raises SettingsError when the plan is another model's."""
    layer = model.get_submodule(path)
    kind = few_bit_kind(layer)
    if kind is None:
        raise SettingsError(f"the plan quantizes {path}, which is {type(layer).__name__} here; it is another model's")
    return kind.of(layer, scheme["rule"], scheme["bits"], scheme["granularity"])


def _check(name: str, value: object, most: int, more: str) -> None:
    if value not in [f"int{bits}" for bits in range(2, most + 1)]:
        raise SettingsError(f"{name} must be int2 to int{most}{more}, got {value!r}")
