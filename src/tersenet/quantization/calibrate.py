"""Chooses the ranges of activations on calibration data.

One pass over the data: it finds the extremes of all values, and keeps an even sample of them, whose histogram the range
is chosen from; min-max needs the extremes alone. Weights are rounded already, so the ranges are those that the runtime
will see, up to the rounding of activations.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, fx, nn

from tersenet.bricks.learned_quantizer import LearnedQuantizer
from tersenet.bricks.quantized import BIAS_STEPS, UNSET, QuantizedLayer
from tersenet.bricks.quantizer import Quantizer
from tersenet.graph.points import centred_quantizers
from tersenet.numerics.ranges import Histogram, affine, centred, divergence_range, mse_range, percentile_range
from tersenet.quantization.cancelled import without_rounding_errors
from tersenet.quantization.observe import Extremes, observe
from tersenet.task import Task

# Values of one place that ranges are chosen from, and how many of each input there are at least.
_KEPT, _LEAST = 2**18, 256
# How much longer the steps of a grid may become to lie around 0; where norms read it more is at stake: a conversion.
_MOST = {False: 1.2, True: 1.5}


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
    # Ranges that were learned in a training stay.
    quantizers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Quantizer) and not isinstance(module, LearnedQuantizer)
    }
    each = 0 if ranges == "minmax" else max(_LEAST, _KEPT // samples)
    seen = {path: _Seen(path, each) for path in quantizers}
    observe(model, task, samples, quantizers, seen)
    found = {path: (values.low, values.high) for path, values in seen.items()}
    if ranges != "minmax":
        histograms = {path: Histogram(low, high) for path, (low, high) in found.items()}
        for path, histogram in histograms.items():
            histogram.add(torch.cat(seen[path].kept))
            bits = quantizers[path].bits
            if ranges == "percentile":
                found[path] = percentile_range(histogram, percentile)
            else:
                found[path] = (mse_range if ranges == "mse" else divergence_range)(histogram, bits)
    assert isinstance(model, fx.GraphModule)
    found = without_rounding_errors(model, found)
    around = centred_quantizers(model)
    for path, quantizer in quantizers.items():
        scale, zero_point = affine(*found[path], quantizer.bits)
        if path in around and quantizer.bits == 8:
            scale, zero_point = centred(*found[path], most=_MOST[around[path]]) or (scale, zero_point)
        quantizer.scale.fill_(scale)
        quantizer.zero_point.fill_(zero_point)
    set_input_scales(model)


class _Seen(Extremes):
    """Lowest and highest value seen at one place, and some of the values.

    Args:
        path: of the quantizer.
        each: how many values to keep of each input.
    """

    def __init__(self, path: str, each: int) -> None:
        super().__init__(path)
        self.each = each
        self.kept: list[Tensor] = []

    def __call__(self, x: Tensor) -> None:
        super().__call__(x)
        if self.each:
            size = x.numel() // len(x)
            step = _coprime(max(1, size // self.each), size)
            self.kept.append(x.detach().flatten()[::step].clone())


def _coprime(step: int, size: int) -> int:
    """The number nearest to `step` that has no factor in common with `size`, the values of one sample: steps with one
    would see some columns of the images, or some channels of (N, T, C), and never the others.

    >>> _coprime(3, 40 * 120), _coprime(8, 3 * 32 * 32)
    (1, 7)
    """
    away = itertools.count()
    return next(each for k in away for each in (step + k, step - k) if each > 0 and math.gcd(each, size) == 1)


def set_input_scales(model: nn.Module) -> None:
    """Each quantized layer takes the scale of the quantizer that it reads, and keeps its bias inside of int32."""
    assert isinstance(model, fx.GraphModule)
    for node in model.graph.nodes:
        layer = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, QuantizedLayer) or layer.input_scale is None:
            continue
        quantizer = model.get_submodule(str(node.args[0].target))
        assert isinstance(quantizer, Quantizer)
        layer.input_scale.copy_(quantizer.scale.detach())
        if layer.bias is not None:
            # A channel of (nearly) zero weights has a tiny scale, in which a bias would be a huge integer.
            least = layer.bias.detach().abs() / (layer.input_scale * BIAS_STEPS)
            layer.weight_scale.copy_(torch.maximum(layer.weight_scale, least))
