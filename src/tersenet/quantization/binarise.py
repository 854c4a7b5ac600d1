"""Binary weights and activations: prepares a training with signs.

Courbariaux et al., arXiv:1602.02830 (bnn); Rastegari et al., arXiv:1603.05279 (bwn, xnor); Liu et al., arXiv:1808.00278
and arXiv:2003.03488 (react). Values and gradients are at bricks/binary.py and bricks/weight_rules.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tersenet.bricks.binary import BinaryConv2d, Sign, binary_weights
from tersenet.bricks.brick import Brick
from tersenet.bricks.evaluating import evaluating
from tersenet.bricks.few_bits import FewBitConv2d, FewBitLayer, few_bit_kind
from tersenet.errors import SettingsError
from tersenet.graph.outside_reads import used_outside
from tersenet.left_alone import LEFT_OUT, LeftAlone, by_layer
from tersenet.quantization.learned_graph import edges_of
from tersenet.quantization.quantize_aware import few_bit_twin
from tersenet.quantization.ternarise import EDGES, no_few_bits, start_layers
from tersenet.step import Plan, Step, replace
from tersenet.task import Task, to_device

# Method -> rule of the weights, gradient of the activations' sign (None: float activations).
METHODS = {
    "bnn": ("bnn", "clipped"),
    "bwn": ("bwn", None),
    "xnor": ("bwn", "clipped"),
    "react": ("magnitude_aware", "polynomial"),
}


@dataclass(frozen=True, kw_only=True)
class Binarise(Step):
    """Prepares a training with binary weights, and but for bwn with binary activations; `train` stands behind it.

    For two-stage training (arXiv:1808.00278, section 4; arXiv:2003.03488, section 5) stand two of these in a recipe,
    each before a `train`: the first with `stage: activations`, in which weights stay real, the second with
    `stage: weights`. A model of `models/binary_resnet.py` is made as after the first.

    Signs of what comes out of a ReLU are all +1, and the papers move the ReLU away. Here the model stays as it is, and
    each sign asks whether a value lies above its channel's mean on a batch of calibration data; react learns on from
    there.

    Args:
        method: bnn (signs without scales), bwn (weights only, scaled), xnor (scaled signs of weights, and of
            activations by how large they are under the kernel), react (scaled signs, learned shifts, polynomial
            gradients).
        stage: both at once, only activations, or only weights.
        edges: whether the first and the last layers stay "float", as in all of these papers, or not ("same").
    """

    several_inputs: ClassVar[bool] = True
    family: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "prepares a training with binary weights and activations (BNN, BWN, XNOR, ReActNet)"
    serves: ClassVar[tuple[str, ...]] = ("conv", "linear (bwn)")
    needs: ClassVar[str] = "inputs"
    makes_layers: ClassVar[bool] = True

    method: Literal["bnn", "bwn", "xnor", "react"] = "react"
    stage: Literal["both", "activations", "weights"] = "both"
    edges: Literal["float", "same"] = "float"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise SettingsError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.stage not in ("both", "activations", "weights"):
            raise SettingsError(f"stage must be both, activations or weights, got {self.stage!r}")
        if self.edges not in ("float", "same"):
            raise SettingsError(f"edges must be float or same, got {self.edges!r}")
        if self.method == "bwn" and self.stage == "activations":
            raise SettingsError("bwn has float activations, so there is no stage of activations; use stage: both")

    def data_needed(self) -> str:
        return "nothing" if self.method == "bwn" or self.stage == "weights" else "inputs"

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """{"method", "layers": {path: rule}, "rules": {path: rule}}: layers to swap, and layers whose rule changes."""
        rule = "real" if self.stage == "activations" else METHODS[self.method][0]
        rules = {
            path: rule
            for path, module in model.named_modules()
            if isinstance(module, FewBitLayer) and module.rule_name == "real" and self.matches(path, module)
        }
        if self.stage == "activations":
            rules = {}
        layers: dict[str, str] = {}
        if self.stage != "weights":
            edges = edges_of(model, task.example) if self.edges == "float" else set()
            outside = used_outside(
                model, task.example, None
            )  # what signs stand before has none of a layer's attributes
            layers = {
                path: rule
                for path, module in model.named_modules()
                if path not in outside and self._takes(path, module, edges)
            }
        found = {"layers": layers, "rules": rules}
        return {"method": self.method, **found} if layers or rules else {}

    def _takes(self, path: str, module: nn.Module, edges: set[str]) -> bool:
        if few_bit_kind(module) is None or path in edges or not self.matches(path, module):
            return False
        return self.method == "bwn" or (isinstance(module, nn.Conv2d) and not isinstance(module, Brick))

    def left_alone(self, model: nn.Module, plan: Plan, task: Task) -> LeftAlone | None:
        outside = used_outside(model, task.example, None)

        def why(path: str, layer: nn.Module) -> str | None:
            if path in plan.get("layers", {}) or path in plan.get("rules", {}):
                return None
            if not self.matches(path, layer):
                return LEFT_OUT
            if reason := no_few_bits(layer):
                return reason
            if self.stage == "weights":
                return "have no binary activations from a stage before"
            if self.method != "bwn" and not isinstance(layer, nn.Conv2d):
                return "are no convolutions; only bwn takes linear layers"
            return outside.get(path, "are the first and last layers")

        return by_layer(model, why, EDGES if self.edges == "float" and self.stage != "weights" else "")

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Swaps the bricks in. Raises SettingsError when the plan is another model's."""
        swaps: dict[str, nn.Module] = {}
        for path, rule in plan.get("layers", {}).items():
            twin = few_bit_twin(model, path, {"rule": rule, "bits": 1, "granularity": "channel"})
            swaps[path] = _with_signs(twin, plan["method"])
        for path, rule in plan.get("rules", {}).items():
            layer: Any = model.get_submodule(path)
            if not isinstance(layer, FewBitLayer):
                raise SettingsError(
                    f"the plan makes {path} binary, which is {type(layer).__name__} here; it is another model's"
                )
            swaps[path] = binary_weights(layer, rule)
        return replace(model, swaps)

    def fit(self, model: nn.Module, task: Task) -> None:
        """Puts the shifts of new signs at the means of their channels; scales of weights follow from the weights.

        Raises:
            DataError: when there is no calibration data.
            ModelError: when weights are not finite.
        """
        start_layers(model, ("real", "bnn", "bwn", "magnitude_aware"))
        if self.data_needed() == "inputs":
            _place_signs(model, task)


def _with_signs(twin: FewBitLayer, method: str) -> nn.Module:
    gradient = METHODS[method][1]
    if gradient is None:
        return twin
    assert isinstance(twin, FewBitConv2d)
    sign = Sign(twin.in_channels, gradient, learned=method == "react")
    sign.to(twin.weight.device)
    return BinaryConv2d(sign, twin, scaled_input=method == "xnor").train(twin.training)


def _place_signs(model: nn.Module, task: Task) -> None:
    """Shift = mean of the channel, or well below where it is constant, for signs whose shift is still 0, from front to
    back in one pass of one batch."""
    new = [module for module in model.modules() if isinstance(module, Sign) and not bool(module.shift.any())]

    def place(sign: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].transpose(0, 1).flatten(1)  # (C, values)
        mean, size = x.mean(1), x.abs().amax(1)
        # Of a channel that says the same to everything, the sign would be that of a rounding error.
        constant = x.amax(1) - x.amin(1) <= 1e-3 * size
        beside = mean - torch.where(size > 0, size / 2, 1.0)
        sign.shift.copy_(torch.where(constant, beside, mean))  # type: ignore[operator]

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = next(iter(task.calibration()))
    hooks = [sign.register_forward_pre_hook(place) for sign in new]
    try:
        with evaluating(model), torch.no_grad():
            task.run(model, to_device(batch, device))
    finally:
        for hook in hooks:
            hook.remove()
