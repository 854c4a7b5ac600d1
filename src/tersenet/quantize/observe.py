"""Calibration data through a model, with something that looks on at each quantizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tersenet.bricks.evaluating import evaluating
from tersenet.bricks.quantizer import Quantizer
from tersenet.errors import DataError, ModelError
from tersenet.task import Task, inputs_of, to_device

# Beyond the values that prepared images can have, by so many times, data are of another kind: pixels of 0 to 255.
_FAR = 20.0


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
                check_inputs(inputs_of(batch), number, task)
                task.run(model, to_device(batch, device))
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None


def check_inputs(inputs: tuple[Tensor, ...], number: int, task: Task) -> None:
    """Raises DataError on a batch of calibration data of another shape, type or range than the model's inputs."""
    examples = inputs_of((task.example, None))
    if len(inputs) != len(examples):
        raise DataError(
            f"calibration batch {number} has {len(inputs)} inputs, the model {len(examples)}; give each batch as "
            "(inputs, target), with several inputs as a tuple"
        )
    for x, wanted in zip(inputs, examples, strict=True):
        _check_input(x, wanted, number, task)


def _check_input(x: Tensor, wanted: Tensor, number: int, task: Task) -> None:
    if x.shape[1:] != wanted.shape[1:] or x.dtype != wanted.dtype:
        raise DataError(
            f"calibration batch {number} is {list(x.shape)} of {x.dtype}, the model's input is [N, "
            f"{', '.join(map(str, wanted.shape[1:]))}] of {wanted.dtype}; prepare both alike"
        )
    if not x.is_floating_point():
        return  # indices have no range to be scaled to
    low, high = (float(value) for value in torch.aminmax(x)) if x.numel() else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DataError(f"calibration batch {number} holds values that are not finite (NaN or infinity); remove them")
    reach = float(wanted.abs().max())
    if x.dim() == 4:
        pairs = zip(task.preparation.mean, task.preparation.std, strict=True)
        reach = max(reach, *(max(abs(mean), abs(1 - mean)) / std for mean, std in pairs))
    if max(-low, high) > _FAR * reach:
        raise DataError(
            f"the values of calibration batch {number} run from {low:.4g} to {high:.4g}, and those of images that are "
            f"prepared for this model reach {reach:.3g} at most; scale pixels to [0, 1], then subtract the mean and "
            "divide by the deviation"
        )
