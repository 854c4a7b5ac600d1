"""Where a training in few bits begins: steps of weights by least squared error, ranges of activations from data.

The ranges are those of least squared error on a histogram, found with float weights, in two passes over the data: one
for the extremes and one for the counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tersenet.bricks.few_bits import FewBitLayer
from tersenet.bricks.learned_quantizer import LearnedQuantizer
from tersenet.errors import DataError, ModelError
from tersenet.numerics.ranges import Histogram, affine, mse_range
from tersenet.task import Task, batch_input, to_device


def start(model: nn.Module, task: Task, samples: int) -> None:
    """First numbers of all layers of few values and learned quantizers. See `QuantizeAware.fit`."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, FewBitLayer)}
    for path, layer in layers.items():
        if not bool(torch.isfinite(layer.weight).all()):
            raise ModelError(f"the weights of {path or 'the layer'} hold NaN or infinity; load finite weights")
        layer.start()
    quantizers = {path: module for path, module in model.named_modules() if isinstance(module, LearnedQuantizer)}
    if not quantizers:
        return
    extremes = {path: _Extremes(path) for path in quantizers}
    _observe(model, task, samples, quantizers, extremes)
    histograms = {path: Histogram(seen.low, seen.high) for path, seen in extremes.items()}
    _observe(model, task, samples, quantizers, {path: histogram.add for path, histogram in histograms.items()})
    with torch.no_grad():
        for path, quantizer in quantizers.items():
            scale, zero_point = affine(*mse_range(histograms[path], quantizer.bits), quantizer.bits)
            quantizer.scale.fill_(scale)
            quantizer.zero_point.fill_(zero_point)


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
    quantizers: Mapping[str, LearnedQuantizer],
    observers: Mapping[str, Callable[[Tensor], None]],
) -> None:
    """Runs the calibration data in evaluation mode, unrounded, with each quantizer's observer looking on."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    layers = [module for module in model.modules() if isinstance(module, FewBitLayer)]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        for layer in layers:
            layer.passing = True
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
        for layer in layers:
            layer.passing = False
        for module, training in modes:
            module.training = training
