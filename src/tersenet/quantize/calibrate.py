"""Chooses the ranges of activations on calibration data.

Two passes: the first finds the extremes, the second counts values between them; min-max needs only the first. Weights
are rounded already, so the ranges are those that the runtime will see, up to the rounding of activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn

from tersenet.bricks.quantized import BIAS_STEPS, UNSET, QuantizedLayer
from tersenet.bricks.quantizer import Quantizer
from tersenet.errors import DataError, ModelError
from tersenet.numerics.ranges import Histogram, affine, mse_range, percentile_range
from tersenet.task import Task, batch_input, to_device


def calibrate(model: nn.Module, task: Task, ranges: str, percentile: float, samples: int) -> None:
    """Sets scale and zero point of every quantizer, then the input scale of every quantized layer.

    Args:
        model: what `Quantize.apply` returned.
        ranges, percentile, samples: as in `Quantize`.
    Raises:
        DataError: on no calibration data, or data that is not finite.
        ModelError: when a value inside the model is not finite; names the place.
    """
    for layer in model.modules():
        if isinstance(layer, QuantizedLayer) and layer.input_scale is not None:
            layer.input_scale.fill_(UNSET)  # so that calibrating again gives the same again
    quantizers = {path: module for path, module in model.named_modules() if isinstance(module, Quantizer)}
    extremes = {path: _Extremes(path) for path in quantizers}
    _observe(model, task, samples, quantizers, extremes)
    found = {path: (seen.low, seen.high) for path, seen in extremes.items()}
    if ranges != "minmax":
        histograms = {path: Histogram(low, high) for path, (low, high) in found.items()}
        _observe(model, task, samples, quantizers, {path: histogram.add for path, histogram in histograms.items()})
        choose = mse_range if ranges == "mse" else lambda histogram: percentile_range(histogram, percentile)
        found = {path: choose(histogram) for path, histogram in histograms.items()}
    for path, quantizer in quantizers.items():
        scale, zero_point = affine(*found[path], quantizer.bits)
        quantizer.scale.fill_(scale)
        quantizer.zero_point.fill_(zero_point)
    _set_input_scales(model)


class _Extremes:
    """Lowest and highest value seen at one place."""

    def __init__(self, path: str) -> None:
        self.path, self.low, self.high = path, math.inf, -math.inf

    def __call__(self, x: Tensor) -> None:
        low, high = (float(v) for v in torch.aminmax(x.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            place = self.path.rpartition(".")[2].removesuffix("_out")
            raise ModelError(
                f"the activations at {place} are not finite during calibration; check the weights for NaN or overflow"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)


def _observe(
    model: nn.Module,
    task: Task,
    samples: int,
    quantizers: dict[str, Quantizer],
    observers: Mapping[str, Callable[[Tensor], None]],
) -> None:
    """Runs the calibration data with each quantizer's observer looking on, in evaluation mode."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        for path, quantizer in quantizers.items():
            quantizer.observer = observers[path]
        with torch.inference_mode():
            for number, batch in enumerate(task.calibration(samples)):
                if not bool(torch.isfinite(batch_input(batch)).all()):
                    raise DataError(
                        f"calibration batch {number} holds values that are not finite (NaN or infinity); remove them"
                    )
                task.forward(model, to_device(batch, device))
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None
        for module, training in modes:
            module.training = training


def _set_input_scales(model: nn.Module) -> None:
    """Each quantized layer takes the scale of the quantizer that it reads, and keeps its bias inside of int32."""
    assert isinstance(model, fx.GraphModule)
    for node in model.graph.nodes:
        layer = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, QuantizedLayer) or layer.input_scale is None:
            continue
        quantizer = model.get_submodule(str(node.args[0].target))
        assert isinstance(quantizer, Quantizer)
        layer.input_scale.copy_(quantizer.scale)
        if layer.bias is not None:
            # A channel of (nearly) zero weights has a tiny scale, in which a bias would be a huge integer.
            least = layer.bias.detach().abs() / (layer.input_scale * BIAS_STEPS)
            layer.weight_scale.copy_(torch.maximum(layer.weight_scale, least))
