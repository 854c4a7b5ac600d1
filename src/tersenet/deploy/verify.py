"""Whether a file does what the model does: every output on real and made inputs, and its score in its own runtime."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tersenet.deploy.reference import Outputs, Reference, Tolerance, difference, root_mean_square
from tersenet.deploy.runner import as_array
from tersenet.deploy.runtimes import Runner, open_file, open_module
from tersenet.deploy.stand_in import StandIn
from tersenet.deploy.stepwise import SLACK, Steps, stepwise
from tersenet.errors import DataError, ExportError
from tersenet.task import Score, Task, inputs_of, score

# Of the largest output: what the same operators of PyTorch may differ by in another order.
_SAME = 1e-5


@dataclass(frozen=True)
class Agreement:
    """How a file's outputs differ from the model's, over some samples; of several outputs the one that is worst.

    Args:
        max_abs_error: largest difference of one output value; infinite when the file says NaN where the model does not.
        max_abs_output: largest output value of the model, which the error is to be read against.
        samples: how many inputs were compared.
        same_top1: share of samples whose largest output is the same one, 0 to 1.
        allowed: the largest error that a right file may have.
        rms_error, allowed_rms: the same of the root mean square over all values.
        output: which one, from 0.
        steps: how far an int8 file is from its simulation at the quantizers; None where that was not compared.
        in_float: operators that were left in float because the runtime computes them wrong in integers.
    """

    max_abs_error: float
    max_abs_output: float
    samples: int
    same_top1: float
    allowed: float = math.inf
    rms_error: float = 0.0
    allowed_rms: float = math.inf
    output: int = 0
    steps: Steps | None = None
    in_float: tuple[str, ...] = ()

    @property
    def excess(self) -> float:
        """The error as a multiple of what is allowed; above 1 the file is wrong."""
        return max(_share(self.max_abs_error, self.allowed), _share(self.rms_error, self.allowed_rms))

    @property
    def agrees(self) -> bool:
        return self.excess <= 1 and (self.steps is None or not self.steps.node)

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, ())}


def compare(runner: Runner, reference: Reference) -> Agreement:
    """Compares all outputs of a file with the model that it was made from, at two batch sizes.

    Raises:
        ExportError: when the file has other outputs, in number or in shape, or does not take a batch, or when the model
            itself gives nothing but NaN.
    """
    reference.check_values()
    best: Agreement | None = None
    try:
        outputs = [runner.run_all(batch) for batch in reference.batches]
    except Exception as error:  # runtimes have their own kinds; all mean that a right input was refused
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        sizes = " and ".join(str(len(batch[0])) for batch in reference.batches)
        raise ExportError(f"{runner.name} does not run in {runner.runtime} on batches of {sizes}: {said}") from error
    for simulation in reference.simulations(runner.runtime):
        expected = reference.outputs(simulation, runner)
        _same_shapes(runner, expected, outputs)
        found = max(
            (_agreement(i, expected, outputs, allowed) for i, allowed in enumerate(reference.tolerances)),
            key=lambda each: each.excess,
        )
        if best is None or found.excess < best.excess:
            best = found
    assert best is not None
    if runner.runtime == "pytorch" and reference.rounds:
        best = _mostly_equal(best, reference.outputs(reference.model, runner), outputs)
    return best


def _same_shapes(runner: Runner, expected: Outputs, outputs: Outputs) -> None:
    for wanted, found in zip(expected, outputs, strict=True):
        if len(wanted) != len(found):
            raise ExportError(f"{runner.name} has {len(found)} outputs in {runner.runtime}, the model {len(wanted)}")
        for i, (a, b) in enumerate(zip(wanted, found, strict=True)):
            # A model may drop the axis of a batch of 1, by squeeze().
            if a.shape != b.shape and not (a.size == b.size and len(b) == 1):
                which = f"output {i} " if len(wanted) > 1 else "outputs "
                raise ExportError(
                    f"{runner.name} gives {which}of shape {b.shape} in {runner.runtime}, the model {a.shape}; "
                    "export it again"
                )


def _agreement(index: int, expected: Outputs, outputs: Outputs, allowed: Tolerance) -> Agreement:
    errors, values, samples, same, largest = [], [], 0, 0.0, 0.0
    for wanted, found in zip(expected, outputs, strict=True):
        a, b = wanted[index], found[index].reshape(wanted[index].shape)
        count = len(a) if a.ndim else 1
        errors.append(difference(a, b).reshape(-1))
        values.append(a.reshape(-1))
        samples += count
        if a.size:
            rows = a.reshape(count, -1), b.reshape(count, -1)
            same += int((rows[0].argmax(axis=1) == rows[1].argmax(axis=1)).sum())
    error, value = np.concatenate(errors), np.concatenate(values)
    largest = float(np.abs(value[np.isfinite(value)]).max(initial=0.0))
    return Agreement(
        max_abs_error=float(error.max(initial=0.0)),
        max_abs_output=largest,
        samples=samples,
        same_top1=same / max(1, samples),
        allowed=allowed.largest,
        rms_error=root_mean_square(error),
        allowed_rms=allowed.rms,
        output=index,
    )


def _mostly_equal(agreement: Agreement, expected: Outputs, outputs: Outputs) -> Agreement:
    """PyTorch runs the operators of the simulation, so 9 of 10 samples of an int8 file are equal, not near."""
    near = [
        float(np.quantile(_per_sample(difference(a, b.reshape(a.shape))), 0.9))
        for wanted, found in zip(expected[1:], outputs[1:], strict=True)
        for a, b in zip(wanted, found, strict=True)
    ]
    allowed = _SAME * max(agreement.max_abs_output, 1e-30)
    if max(near, default=0.0) <= allowed:
        return agreement
    return replace(agreement, max_abs_error=max(agreement.max_abs_error, *near), allowed=allowed)


def _per_sample(error: Any) -> Any:
    return error.reshape(len(error), -1).max(axis=1, initial=0.0) if error.ndim else error[None]


def _share(error: float, allowed: float) -> float:
    if not math.isfinite(error):
        return math.inf
    return error / allowed if allowed > 0 else (0.0 if error == 0 else math.inf)


def compare_file(path: Path, runtime: str, reference: Reference) -> Agreement:
    """A file compared at its outputs, and, where it rounds activations and is ONNX, at every quantizer.

    Raises:
        ExportError: when it does not run, or has other outputs or quantizers than the model.
    """
    agreement = compare(open_file(path, runtime), reference)
    if reference.rounds and path.suffix == ".onnx" and not path.name.endswith(".tensorrt.onnx"):
        steps = stepwise(path, runtime, reference)
        agreement = replace(agreement, steps=steps)
    return agreement


def check(agreement: Agreement, name: str = "the file") -> None:
    """Holds a file to the model.

    Raises:
        ExportError: when the error is larger than a right file's can be, with the figures.
    """
    if agreement.agrees:
        return
    which = f"output {agreement.output}: " if agreement.output else ""
    said = (
        f"{name} does not agree with the model: {which}the largest error is {agreement.max_abs_error:.3g} on outputs "
        f"up to {agreement.max_abs_output:.3g}, over {agreement.samples} samples; allowed is {agreement.allowed:.3g}"
    )
    if agreement.excess <= 1 and agreement.steps is not None:
        steps = agreement.steps
        said = (
            f"{name} does not agree with the model behind {steps.node}"
            if steps.node == "output"
            else f"{name} does not agree with the model at {steps.node}: {100 * steps.share:.2g} % of its integers are "
            f"off, by up to {steps.beyond + 0.5:.3g} steps; allowed is {0.5 + SLACK:g}"
        )
    elif _share(agreement.max_abs_error, agreement.allowed) <= 1:
        said += f"; the root mean square is {agreement.rms_error:.3g}, allowed is {agreement.allowed_rms:.3g}"
    raise ExportError(said)


def verify(runner: Runner, model: nn.Module, batches: Iterable[Any], limit: int = 256) -> Agreement:
    """How far a file is from a model on the inputs as they are; nothing is held to anything.

    Args:
        runner: the file, open in its runtime.
        model: any module; its modes are put back.
        batches: inputs (N, ...), or (input, target) pairs, or dicts; several inputs as in Task.
        limit: at most this many samples are compared.
    Raises:
        DataError: when there are no inputs.
        ExportError: when the outputs do not even have the same shape.
    """
    inputs_as_given = tuple(replace(each, dtype=None) for each in runner.inputs)
    reference = open_module(model, runner.threads, runner.input_shape, inputs_as_given)
    expected: Outputs = []
    outputs: Outputs = []
    samples = 0
    for batch in batches:
        if samples >= limit:
            break
        inputs = [as_array(x[: limit - samples]) for x in inputs_of(batch)]
        if len(inputs[0]) == 0:
            continue
        expected.append(reference.run_all(inputs))
        outputs.append(runner.run_all(inputs))
        samples += len(inputs[0])
    if samples == 0:
        raise DataError("there is nothing to compare on: the data is empty (0 samples); give at least one input")
    _same_shapes(runner, expected, outputs)
    anything = Tolerance(math.inf, math.inf)
    found = [_agreement(i, expected, outputs, anything) for i in range(len(expected[0]))]
    return max(found, key=lambda each: each.max_abs_error)


def score_file(runner: Runner, task: Task, data: Iterable[Any]) -> Score:
    """The score of a file in its own runtime, in the batches of `data`; the task's own forward and metric are kept.

    Raises:
        DataError: on no data, labels out of range, or inputs that do not fit the file.
    """
    file: Any = StandIn(runner)  # a forward takes the model to be called
    return score(lambda batch: task.forward(file, batch), data, task.metric)
