"""One pass over the network, float and quantized side by side: rounding is repaired layer after layer, and means kept.

Each layer sees what the layers before it give now, rounded weights and activations and all, and what they gave in the
float network (as in Frantar et al., arXiv:2210.17323, for weights; the float inputs beside them as in Nagel et al.,
arXiv:2004.10568, equation 25). Afterwards its bias takes back the shift of its mean output (arXiv:1906.04721); where a
batch norm follows, the norm's statistics follow what their input's do instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from tersenet.bricks.coded import RoundedLayer
from tersenet.bricks.codes import FloatCode
from tersenet.bricks.evaluating import evaluating
from tersenet.bricks.mask import stored_weight
from tersenet.bricks.quantized import QuantizedLayer
from tersenet.graph import rows
from tersenet.graph.trace import trace
from tersenet.numerics.samples import first
from tersenet.quantization.learn import learned
from tersenet.quantization.repair import Inputs, repaired
from tersenet.quantization.side_by_side import SideBySide
from tersenet.task import Task

# Layers of fewer bits are repaired by default: at 8, rounding to nearest lost nothing in an eighth of the time.
COARSE = 8


def is_coarse(layer: Any) -> bool:
    """Whether a layer is quantized to fewer than 8 bits a weight."""
    if isinstance(layer, QuantizedLayer):
        return layer.bits < COARSE
    if not isinstance(layer, RoundedLayer) or isinstance(layer.code, FloatCode):
        return False
    return getattr(layer.code, "bits", 0) < COARSE  # ternary, sums of signs and pieces say none: less than 4


def refine(model: nn.Module, task: Task, rounding: str, correct_bias: bool, samples: int) -> None:
    """Changes weights, biases, shared values and norm statistics of a quantized model.

    Args:
        model: what `Quantize.apply` returned, with ranges and shared values chosen.
        rounding, correct_bias, samples: as in `Quantize`; of the samples, as many as fit in memory are taken.
    """
    inputs = task.inputs_like(model, samples)
    graph = trace(model, first(inputs, 2))
    inputs = first(inputs, rows.fitting(graph))
    with evaluating(model), torch.no_grad():
        _Refine(graph, len(inputs[0]), rounding, correct_bias).run(*inputs)


class _Refine(SideBySide):
    """Fits each layer when its turn comes; those behind it then see what it gives."""

    def __init__(self, graph: fx.GraphModule, images: int, rounding: str, correct_bias: bool) -> None:
        super().__init__(graph)
        self.images, self.rounding, self.correct_bias = images, rounding, correct_bias

    def visit(self, node: fx.Node, layer: Any, was: Tensor, now: Tensor) -> None:
        if isinstance(layer, QuantizedLayer | RoundedLayer) and _readable(layer):
            self._fit(layer, node, was, now)
        elif self.correct_bias and _has_statistics(layer):
            _follow(layer, was, now)

    def _fit(self, layer: Any, node: fx.Node, was: Tensor, now: Tensor) -> None:
        chosen = rows.places(node, layer, self.images)
        float_rows, now_rows = (rows.read(value, layer, chosen) for value in (was, now))
        centred = layer.bias is not None or self._norm_behind(node)
        inputs = Inputs.of(float_rows, now_rows, getattr(layer, "groups", 1), centred)
        before = layer.weight.detach().clone()
        rounding = self.rounding
        if rounding == "auto":
            rounding = "repaired" if is_coarse(layer) else "nearest"
        if rounding == "repaired":
            made = repaired(layer, inputs)
        elif rounding == "learned":
            made = learned(layer, inputs, now_rows)
        else:
            made = layer.rounded_weight().detach()
        if rounding != "nearest":
            stored_weight(layer).copy_(made)
        if layer.bias is not None and self.correct_bias:
            groups = len(inputs.gram)
            grouped = (part.flatten(1).unflatten(0, (groups, -1)) for part in (before, made))
            layer.bias.add_(inputs.shift(*grouped).to(layer.bias.dtype))

    def _norm_behind(self, node: fx.Node) -> bool:
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if user is None or user.op != "call_module" or not self.correct_bias:
            return False
        return _has_statistics(self.module.get_submodule(str(user.target)))


def _follow(norm: Any, was: Tensor, now: Tensor) -> None:
    """Mean and variance of a batch norm follow those of its input: how far the two were apart, in deviations, stays."""
    (mean, variance), (now_mean, now_variance) = _moments(was), _moments(now)
    wider = torch.where(variance > 0, now_variance / variance, 1.0)
    norm.running_mean.copy_(now_mean + (norm.running_mean - mean) * wider.sqrt())
    norm.running_var.mul_(wider)


def _moments(value: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of (N, C, ...) for each channel."""
    found = value.movedim(1, 0).flatten(1)
    return found.mean(dim=1), found.var(dim=1)


def _readable(layer: Any) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return True


def _has_statistics(module: Any) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
