"""Calibration data through a model, with something that looks on at each quantizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersenet.bricks.evaluating import evaluating
from tersenet.bricks.quantizer import Quantizer
from tersenet.errors import ModelError
from tersenet.task import Task, inputs_of, to_device

_PADS = {torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default}


class Extremes:
    """Lowest and highest value seen at one place.

    Args:
        path: of the quantizer.
    """

    def __init__(self, path: str) -> None:
        self.path, self.low, self.high = path, math.inf, -math.inf

    def __call__(self, x: Tensor) -> None:
        """Raises ModelError on values that are not finite; names the place."""
        low, high = (float(v) for v in torch.aminmax(x.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            place = self.path.rpartition(".")[2].removesuffix("_out")
            raise ModelError(
                f"the activations at {place} are not finite during calibration; check the weights for NaN or overflow"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)


def observe(
    model: nn.Module,
    task: Task,
    samples: int,
    quantizers: Mapping[str, Quantizer],
    observers: Mapping[str, Callable[[Tensor], None]],
) -> None:
    """Runs the calibration data in evaluation mode, with each quantizer's observer looking on.

    These quantizers pass on what they see meanwhile.

    Raises:
        DataError: on data of another shape, type or range than the model's inputs.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    padded = _padded_with_infinity(model)
    try:
        for path, quantizer in quantizers.items():
            own = observers[path]
            quantizer.observer = partial(_without, padded[path], own) if path in padded else own
        with evaluating(model), torch.inference_mode():
            for number, batch in enumerate(task.calibration(samples)):
                task.check_inputs(inputs_of(batch), number)
                task.run(model, to_device(batch, device))
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None


def _without(padding: float, observer: Callable[[Tensor], None], x: Tensor) -> None:
    """What is padded counts as 0, which every range holds; NaN and the other infinity are seen."""
    observer(x.where(x != padding, 0.0))


def _padded_with_infinity(model: nn.Module) -> dict[str, float]:
    """Path of each quantizer behind a padding with infinity, as a maximum has it that may not see its edge -> what is
    padded. On a grid it becomes the lowest value, which no maximum takes either."""
    if not isinstance(model, fx.GraphModule):
        return {}
    return {
        str(node.target): value
        for node in model.graph.nodes
        if node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), Quantizer)
        for value in _padding(node.args[0])
        if isinstance(value, float) and math.isinf(value)
    }


def _padding(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of a padding; () of other nodes."""
    return (*node.args[1:], *node.kwargs.values()) if node.target in _PADS else ()
