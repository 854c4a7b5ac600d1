"""Static quantization to int8: weights per output channel, activations per tensor with calibrated ranges.

The scheme is that of Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only
inference", arXiv:1712.05877, with symmetric weights per channel as in Krishnamoorthi, arXiv:1806.08342, which is what
ONNX Runtime and OpenVINO have kernels for. What PyTorch simulates afterwards is what those runtimes compute, up to
ties in rounding. How activations are calibrated is in quantize/calibrate.py.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tersenet.bricks.quantized import QuantizedLayer, quantized_kind
from tersenet.errors import ModelError, SettingsError
from tersenet.graph.trace import trace
from tersenet.numerics.divergence import divergence
from tersenet.numerics.ranges import weight_scales
from tersenet.step import Plan, Step, replace
from tersenet.task import Task

RANGES = ("mse", "minmax", "percentile")


@dataclass(frozen=True, kw_only=True)
class Quantize(Step):
    """Quantizes convolutions and linear layers to int8, and with `activations` everything between them.

    With activations, batch norms are folded on the way, zero-padding shortcuts become convolutions, and the root
    becomes a `torch.fx.GraphModule` that shares its layers with the model; the model's outputs stay float.

    A convolution that `only` or `skip` leaves out stays float here, but ONNX Runtime rounds its weights by itself where
    it stands between two rounded values.

    Args:
        weights: "int8".
        activations: "int8", or None for weights only (smaller, not faster).
        ranges: how far a grid reaches: "mse" (least squared error, for weights too), "minmax" (everything), or
            "percentile" (activations; weights as in "minmax").
        percentile: share of the values inside the range, in percent; only for ranges="percentile".
        samples: how many calibration samples.
    """

    family: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "quantizes weights and activations to int8, statically"
    serves: ClassVar[tuple[str, ...]] = ("conv", "linear")
    needs: ClassVar[str] = "inputs"

    weights: str = "int8"
    activations: str | None = "int8"
    ranges: str = "mse"
    percentile: float = 99.99
    samples: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights != "int8":
            raise SettingsError(f"weights must be int8, got {self.weights!r}")
        if self.activations not in ("int8", None):
            raise SettingsError(f"activations must be int8 or null (weights only), got {self.activations!r}")
        if self.ranges not in RANGES:
            raise SettingsError(f"ranges must be one of {', '.join(RANGES)}, got {self.ranges!r}")
        if not 50 < self.percentile <= 100:
            raise SettingsError(f"percentile must lie in (50, 100], got {self.percentile}; 100 is min-max")
        if self.samples < 1:
            raise SettingsError(f"samples must be at least 1, got {self.samples}")

    def data_needed(self) -> str:
        return "nothing" if self.activations is None else "inputs"

    def choices(self, model: nn.Module, task: Task) -> dict[str, list[Any]]:
        """Path of a layer that reads the model's input -> "int8" or "float".

        Float pays there now and then: a convolution of three channels has no good int8 kernel. Layers between two
        rounded values are no choice, because ONNX Runtime rounds them whatever the file says.
        """
        if self.activations is None:
            return {}
        graph = trace(model, task.example)
        found = []
        for node in graph.graph.nodes:
            if node.op != "call_module" or all(source.op != "placeholder" for source in node.all_input_nodes):
                continue
            path, layer = str(node.target), graph.get_submodule(str(node.target))
            if quantized_kind(layer) is not None and self.matches(path, layer):
                found.append(path)
        return {path: ["int8", "float"] for path in dict.fromkeys(found)}

    def sensitivities(self, model: nn.Module, task: Task, images: Tensor) -> dict[str, dict[Any, float]]:
        """path -> {"int8": divergence when this layer alone is rounded, "float": 0}."""
        few = dataclasses.replace(task, calibrate=[images], test=None, quiet=True)
        found = {}
        with torch.no_grad():
            wanted = model(images)
            for path in self.choices(model, task):
                alone, _ = dataclasses.replace(self, only=(path,), skip=()).run(copy.deepcopy(model), few)
                found[path] = {"int8": divergence(wanted, alone(images)), "float": 0.0}
        return found

    def chosen(self, picked: Mapping[str, Any]) -> Quantize:
        floats = tuple(path for path, precision in picked.items() if precision == "float")
        return dataclasses.replace(self, skip=(*self.skip, *floats))

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """{"layers": {path: scheme}}, and with activations the input, the points and what stays float."""
        if self.activations is not None:
            from tersenet.quantize.activations import plan_activations

            return plan_activations(model, task.example, self)
        found = [
            path for path, module in model.named_modules() if quantized_kind(module) and self.matches(path, module)
        ]
        return {"layers": {path: {"weights": self.weights} for path in found}} if found else {}

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Swaps the bricks in. Until `fit` has run (or a state dict is loaded) the scales are placeholders."""
        if plan and plan.get("input") is not None:
            from tersenet.quantize.activations import apply_activations

            return apply_activations(model, plan)
        swaps: dict[str, nn.Module] = {}
        for path in plan.get("layers", {}):
            layer = model.get_submodule(path)
            kind = quantized_kind(layer)
            if kind is None:
                raise SettingsError(
                    f"the plan quantizes {path}, which is {type(layer).__name__} here; it is another model's"
                )
            swaps[path] = kind.of(layer, input_quantized=False)
        return replace(model, swaps)

    def fit(self, model: nn.Module, task: Task) -> None:
        """Chooses the scales of the weights, then the ranges of the activations on `task.calibration(samples)`.

        Raises:
            DataError: when there is no calibration data, or it holds values that are not finite.
            ModelError: when weights or activations are not finite.
        """
        bricks = {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLayer)}
        for path, brick in bricks.items():
            if not bool(torch.isfinite(brick.weight).all()):
                raise ModelError(f"the weights of {path or 'the layer'} hold NaN or infinity; load finite weights")
            brick.weight_scale.copy_(weight_scales(brick.weight, method=self.ranges))
        if self.activations is not None and any(brick.input_quantized for brick in bricks.values()):
            from tersenet.quantize.calibrate import calibrate

            calibrate(model, task, self.ranges, self.percentile, self.samples)
