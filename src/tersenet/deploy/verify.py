"""Whether a file does what the model does: the largest difference on real inputs, and its score in its own runtime."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from tersenet.deploy.runtimes import Runner, open_module
from tersenet.deploy.stand_in import StandIn
from tersenet.errors import DataError, ExportError
from tersenet.task import Score, Task, batch_input, score


@dataclass(frozen=True)
class Agreement:
    """How a file's outputs differ from the model's, over some samples.

    Args:
        max_abs_error: largest difference of one output value; infinite when the file says NaN where the model does not.
        max_abs_output: largest output value of the model, which the error is to be read against.
        samples: how many inputs were compared.
        same_top1: share of samples whose largest output is the same one, 0 to 1.
    """

    max_abs_error: float
    max_abs_output: float
    samples: int
    same_top1: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(runner: Runner, model: nn.Module, batches: Iterable[Any], limit: int = 256) -> Agreement:
    """Compares a file with the model that it was made from, on real inputs.

    Args:
        runner: the file, open in its runtime.
        model: any module of one input; its modes are put back.
        batches: inputs (N, ...), or (input, target) pairs, or dicts.
        limit: at most this many samples are compared.
    Raises:
        DataError: when there are no inputs.
        ExportError: when the outputs do not even have the same shape.
    """
    reference = open_module(model, runner.threads, runner.input_shape)
    error = largest = 0.0
    samples = same = 0
    for batch in batches:
        if samples >= limit:
            break
        x = np.asarray(batch_input(batch)[: limit - samples].detach().cpu().float())
        if len(x) == 0:
            continue
        expected, got = reference.run(x), runner.run(x)
        if expected.shape != got.shape:
            raise ExportError(
                f"{runner.name} gives outputs of shape {got.shape} in {runner.runtime}, the model {expected.shape}; "
                "export it again"
            )
        with np.errstate(invalid="ignore"):  # infinity minus infinity, which the next line settles
            difference = np.abs(expected.astype(np.float64) - got)
        # Where both are NaN (or the same infinity) they agree; NaN or infinity on one side only is an infinite error.
        difference[(expected == got) | (np.isnan(expected) & np.isnan(got))] = 0.0
        error = max(error, float(np.nan_to_num(difference, nan=math.inf, posinf=math.inf).max(initial=0.0)))
        largest = max(largest, float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0)))
        flat, flat_got = expected.reshape(len(x), -1), got.reshape(len(x), -1)
        same += int((flat.argmax(axis=1) == flat_got.argmax(axis=1)).sum())
        samples += len(x)
    if samples == 0:
        raise DataError("there is nothing to compare on: the data is empty (0 samples); give at least one input")
    return Agreement(error, largest, samples, same / samples)


def check(agreement: Agreement, tolerance: float, name: str = "the file") -> None:
    """Holds a file to the model.

    Args:
        tolerance: the largest error allowed, as a share of the largest output where that is above 1: float32 cannot
            hold an absolute error on large outputs.
    Raises:
        ExportError: when the error is larger, with the figures.
    """
    allowed = tolerance * max(1.0, agreement.max_abs_output)
    if not agreement.max_abs_error <= allowed:
        raise ExportError(
            f"{name} does not agree with the model: the largest error is {agreement.max_abs_error:.3g} on outputs "
            f"up to {agreement.max_abs_output:.3g}, over {agreement.samples} samples; allowed is {allowed:.3g}"
        )


def score_file(runner: Runner, task: Task, data: Iterable[Any]) -> Score:
    """The score of a file in its own runtime, in the batches of `data`; the task's own forward and metric are kept.

    Raises:
        DataError: on no data, labels out of range, or inputs that do not fit the file.
    """

    file: Any = StandIn(runner)  # a forward takes the model to be called
    return score(lambda batch: task.forward(file, batch), data, task.metric)
