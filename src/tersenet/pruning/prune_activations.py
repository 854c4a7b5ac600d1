"""Activation pruning: thresholds behind the activation functions, chosen on calibration data.

The threshold itself is that of Kurtz et al., "Inducing and exploiting activation sparsity for fast inference on deep
neural networks", ICML 2020 (FATReLU). They start every layer from one small value and train; here the thresholds are
chosen from how the activations are spread, by a share of zeros, by the least squared error, or by what the error of
each layer does to the outputs; then the layers behind are refitted by least squares. Training behind them, with
`ActivationPenalty` or without, is a step of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from tersenet.bricks.evaluating import evaluating
from tersenet.bricks.quantizer import Quantizer
from tersenet.bricks.threshold import Threshold
from tersenet.errors import ModelError, SettingsError
from tersenet.findings import tell
from tersenet.graph.trace import said_input, trace, trace_with
from tersenet.left_alone import LEFT_OUT, LeftAlone, another_kind, by_layer
from tersenet.numerics.divergence import divergence
from tersenet.numerics.magnitudes import Magnitudes, equal_marginals
from tersenet.numerics.samples import in_parts
from tersenet.pruning.activation_sites import PLACES, READERS, activation_sites, insert_thresholds, thresholds_at
from tersenet.pruning.repair import repair
from tersenet.pruning.sound import UNDONE
from tersenet.step import Plan, Step
from tersenet.task import Task, to_device

SHARES = ("layer", "error", "sensitivity")
# Images on which outputs are compared.
_COMPARED_ON = 256
_REPAIRED_ON = 512
_BISECTIONS = 8


@dataclass(frozen=True, kw_only=True)
class PruneActivations(Step):
    """Sets small activations to zero, so that a kernel for sparse inputs could skip them. No such kernel is in ONNX
    Runtime or OpenVINO, where the comparison costs a little and the zeros gain nothing.

    The root becomes a `torch.fx.GraphModule` that shares its layers with the model, captured in evaluation mode.
    Drop blocks before, because a graph has none; channels can be pruned, norms folded and layers quantized before
    or after.

    Args:
        sparsity: share of zeros among the values at the sites, those that a ReLU makes by itself included; where
            there are more already, nothing is cut.
        share: how it is divided. "layer": the same share at every site. "error": over all sites together, at the
            least sum of relative squared errors. "sensitivity": likewise, with each site's error weighted by what it
            did to the outputs when that site alone was cut.
        per_channel: one threshold per channel instead of one per site.
        places: "relu" (behind ReLU and clips from zero), "activations" (behind GELU, SiLU and the like too, cut by
            size) or "inputs" (whatever a convolution or linear layer reads, but the model's own input).
        max_divergence: cut less than `sparsity` where otherwise the outputs would be further away than this from
            the outputs before, in the measure of numerics/divergence.py; None sets no bound.
        samples: how many calibration samples.
        refit: repair all layers and norms behind a threshold by least squares, on up to 512 calibration samples.
        only: cut only what is read by layers that match; a value that another layer reads too is left alone.
        skip: cut nothing that is read by a layer that matches.
    """

    several_inputs: ClassVar[bool] = True
    family: ClassVar[str] = "prune"
    summary: ClassVar[str] = "sets small activations to zero, for kernels that skip zeros"
    serves: ClassVar[tuple[str, ...]] = ("activation function in front of conv or linear",)
    needs: ClassVar[str] = "inputs"
    special_runtime: ClassVar[bool] = True
    makes_layers: ClassVar[bool] = True

    sparsity: float = 0.6
    share: str = "error"
    per_channel: bool = False
    places: str = "activations"
    max_divergence: float | None = None
    samples: int = 256
    refit: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise SettingsError(f"sparsity must lie in [0, 1), got {self.sparsity}; it is the share of zeros")
        if self.share not in SHARES:
            raise SettingsError(f"share must be one of {', '.join(SHARES)}, got {self.share!r}")
        if self.places not in PLACES:
            raise SettingsError(f"places must be one of {', '.join(PLACES)}, got {self.places!r}")
        if self.max_divergence is not None and not 0 < self.max_divergence < math.inf:
            raise SettingsError(f"max_divergence must be above 0 or null (no bound), got {self.max_divergence}")
        if self.samples < 1:
            raise SettingsError(f"samples must be at least 1, got {self.samples}")

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """{"input": {"shape", "dtype"}, "sites": {node: {"channels", "signed", "readers"}}}; {} without a site."""
        sites = activation_sites(trace(model, task.example), self.places, self.per_channel, self)
        if not sites:
            return {}
        return {"input": said_input(task.example), "sites": sites}

    def left_alone(self, model: nn.Module, plan: Plan, task: Task) -> LeftAlone | None:
        """Layers whose inputs are not cut."""
        sites = activation_sites(trace(model, task.example), self.places, self.per_channel, Step())
        could = {path for site in sites.values() for path in site["readers"]}
        cut = {path for site in plan.get("sites", {}).values() for path in site["readers"]}
        wanted = {"relu": "what a ReLU makes", "activations": "what an activation function makes", "inputs": "a layer"}

        def why(path: str, layer: nn.Module) -> str | None:
            if path in cut:
                return None
            if not isinstance(layer, READERS):
                return another_kind(layer)
            return LEFT_OUT if path in could else f"do not read {wanted[self.places]}"

        return by_layer(model, why)

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Inserts the thresholds, all of them 0 until `fit` has run or a state dict is loaded.

        Raises:
            SettingsError: when the plan is another model's.
        """
        if not plan:
            return model
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        graph = trace_with(model, plan["input"])
        try:
            insert_thresholds(graph, plan["sites"])
        except KeyError as error:
            raise SettingsError(
                f"the plan does not fit: this model has no {error}; apply it to the model it was made for"
            ) from error
        return graph.to(device)

    def fit(self, model: nn.Module, task: Task) -> None:
        """Chooses the thresholds on `task.calibration(samples)`, then repairs what is behind them.

        Raises:
            DataError: when there is no calibration data.
            ModelError: when an activation is not finite, or the outputs that a bound is about are no tensor.
        """
        graph = trace(model, task.example)
        found = thresholds_at(graph, activation_sites(graph, self.places, self.per_channel, self))
        if not found:
            return
        bricks: dict[str, Any] = {path: graph.get_submodule(path) for path in found}
        choice = _Choice(self, graph, task, bricks)
        choice.make()
        if self.refit and any(bool((brick.threshold > 0).any()) for brick in bricks.values()):
            _repair(graph, bricks, task)
            choice.again()
        for path, quantizer in found.items():
            if quantizer is not None:
                _between_steps(bricks[path], graph.get_submodule(quantizer))


class _Choice:
    """Chooses the thresholds of one model."""

    def __init__(self, settings: PruneActivations, model: fx.GraphModule, task: Task, bricks: Mapping[str, Any]):
        self.settings, self.model, self.task, self.bricks = settings, model, task, bricks
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.images = task.inputs_like(model, _COMPARED_ON)
        self.wanted: Tensor | None = None
        self.weights = dict.fromkeys(bricks, 1.0)

    def make(self) -> None:
        settings = self.settings
        self._set(dict.fromkeys(self.bricks))
        if settings.sparsity == 0:
            return
        spread = self._spread()
        if settings.share == "sensitivity":
            self.weights = self._weights(spread)
        if settings.max_divergence is not None:
            low, high = 0.0, settings.sparsity
            self._set(self._thresholds(spread, high))
            for _ in range(_BISECTIONS if self._divergence() > settings.max_divergence else 0):
                middle = (low + high) / 2
                self._set(self._thresholds(spread, middle))
                low, high = (low, middle) if self._divergence() > settings.max_divergence else (middle, high)
                self._set(self._thresholds(spread, low))
            return
        self._set(self._thresholds(spread, settings.sparsity))
        self.again()

    def again(self) -> None:
        """Chooses once more for what the thresholds see now, so that the share is what was asked for."""
        if self.settings.max_divergence is None:
            self._set(self._thresholds(self._spread(), self.settings.sparsity))

    def _thresholds(self, spread: Mapping[str, Magnitudes], share: float) -> dict[str, Tensor | None]:
        if self.settings.share == "layer":
            return {path: place.threshold(share) for path, place in spread.items()}
        found = equal_marginals(list(spread.values()), [self.weights[path] for path in spread], share)
        return dict(zip(spread, found, strict=True))

    def _weights(self, spread: Mapping[str, Magnitudes]) -> dict[str, float]:
        """path -> divergence of the outputs per relative squared error, when this site alone is cut to the share."""
        weights = {}
        for path, place in spread.items():
            # Where a ReLU alone makes that many zeros, half of the others are cut to have something to see.
            zeros = float(place.zeros.sum()) / max(1, int(place.total.sum()))
            limits = place.threshold(max(self.settings.sparsity, (1 + zeros) / 2))
            error = float((place.error_below(limits) * place.total).sum() / place.total.sum())
            self._set({path: limits})
            weights[path] = max(self._divergence() / max(error, 1e-12), 1e-12)
            self._set({path: None})
        return weights

    def _set(self, thresholds: Mapping[str, Tensor | None]) -> None:
        for path, value in thresholds.items():
            limit = self.bricks[path].threshold
            limit.copy_((torch.zeros(()) if value is None else value.reshape(limit.shape)).to(limit))

    def _divergence(self) -> float:
        """From the outputs that the model had when this was first asked for, which is before any cut."""
        if self.wanted is None:
            held = {path: brick.threshold.clone() for path, brick in self.bricks.items()}
            self._set(dict.fromkeys(self.bricks))
            self.wanted = self._outputs()
            for path, value in held.items():
                self.bricks[path].threshold.copy_(value)
        return divergence(self.wanted, self._outputs())

    def _outputs(self) -> Tensor:
        with evaluating(self.model), torch.no_grad():
            found = [self.model(*part) for part in in_parts(self.images, 64)]
        if not all(isinstance(part, Tensor) for part in found):
            raise ModelError(
                f"the model's output is {type(found[0]).__name__} and no tensor, so outputs cannot be compared; "
                "use share: error and no max_divergence"
            )
        return torch.cat(found)

    def _spread(self) -> dict[str, Magnitudes]:
        """How the values in front of each threshold are spread, with the thresholds as they are."""
        spread = {path: Magnitudes(max(1, brick.threshold.numel())) for path, brick in self.bricks.items()}

        def look(path: str) -> Any:
            def hook(brick: nn.Module, args: tuple[Tensor]) -> None:
                values = args[0]
                if not bool(torch.isfinite(values).all()):
                    raise ModelError(
                        f"the activations in front of {path} are not finite; check the weights for NaN or overflow"
                    )
                rows = values.transpose(0, 1).flatten(1) if brick.threshold.dim() else values.reshape(1, -1)  # type: ignore[operator]
                spread[path].add(rows)

            return hook

        hooks = [brick.register_forward_pre_hook(look(path)) for path, brick in self.bricks.items()]
        try:
            with evaluating(self.model), torch.no_grad():
                self._run_calibration()
        finally:
            for handle in hooks:
                handle.remove()
        return spread

    def _run_calibration(self) -> None:
        for batch in self.task.calibration(self.settings.samples):
            self.task.run(self.model, to_device(batch, self.device))


def _repair(graph: fx.GraphModule, bricks: Mapping[str, Any], task: Task) -> None:
    """Refits the layers to what they gave with these thresholds at 0."""
    before = copy.deepcopy(graph)
    for path in bricks:
        before.get_submodule(path).threshold.zero_()  # type: ignore[operator]
    if not repair(graph, task.inputs_like(graph, _REPAIRED_ON), before, {}):
        tell([UNDONE], task.quiet)


def _between_steps(brick: Any, quantizer: nn.Module) -> None:
    """Moves thresholds of rounded values to the middle between two steps, where no rounding error can cross them."""
    assert isinstance(brick, Threshold)
    assert isinstance(quantizer, Quantizer)
    scale = quantizer.scale.detach().abs()
    steps = torch.floor(brick.threshold / scale) + 0.5
    brick.threshold.copy_(torch.where(brick.threshold > 0, steps * scale, brick.threshold))
