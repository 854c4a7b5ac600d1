"""Calibration data through a model, with something that looks on at each quantizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tersenet.bricks.evaluating import evaluating
from tersenet.bricks.quantizer import Quantizer
from tersenet.errors import ModelError
from tersenet.task import Task, inputs_of, to_device


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
    try:
        for path, quantizer in quantizers.items():
            quantizer.observer = observers[path]
        with evaluating(model), torch.inference_mode():
            for number, batch in enumerate(task.calibration(samples)):
                task.check_inputs(inputs_of(batch), number)
                task.run(model, to_device(batch, device))
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None
