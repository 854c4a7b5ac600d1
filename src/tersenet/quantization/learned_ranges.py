"""Where a training in few bits begins: steps of weights by least squared error, ranges of activations from data.

The ranges are those of least squared error on a histogram, found with float weights, in two passes over the data: one
for the extremes and one for the counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import nn

from tersenet.bricks.few_bits import FewBitLayer
from tersenet.bricks.learned_quantizer import LearnedQuantizer
from tersenet.errors import ModelError
from tersenet.numerics.ranges import Histogram, affine, mse_range
from tersenet.quantization.calibration_data import warn_of_calibration
from tersenet.quantization.observe import Extremes, observe
from tersenet.task import Task


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
    warn_of_calibration(task, samples)
    extremes = {path: Extremes(path) for path in quantizers}
    with _float_weights(layers.values()):
        observe(model, task, samples, quantizers, extremes)
        histograms = {path: Histogram(seen.low, seen.high) for path, seen in extremes.items()}
        observe(model, task, samples, quantizers, {path: histogram.add for path, histogram in histograms.items()})
    with torch.no_grad():
        for path, quantizer in quantizers.items():
            scale, zero_point = affine(*mse_range(histograms[path], quantizer.bits), quantizer.bits)
            quantizer.scale.fill_(scale)
            quantizer.zero_point.fill_(zero_point)


@contextlib.contextmanager
def _float_weights(layers: Collection[FewBitLayer]) -> Iterator[None]:
    """Layers compute with the weights that their values are made from."""
    for layer in layers:
        layer.passing = True
    try:
        yield
    finally:
        for layer in layers:
            layer.passing = False
