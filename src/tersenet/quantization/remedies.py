"""What to do when quantizing costs much: remedies are tried on calibration images before one is named.

No labels are needed: the judge is how far the outputs are from the float network's, as a share of their variance. A
healthy network costs two forwards of 32 images; only where that share is large are places looked for and remedies
tried, each a quantization of its own on few images, one after another until one works.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tersenet.bricks.evaluating import evaluating
from tersenet.errors import SettingsError, TersenetError
from tersenet.findings import unasked
from tersenet.numerics.outputs import floats
from tersenet.quantization.verdicts import Findings, look
from tersenet.task import Task

if TYPE_CHECKING:
    from tersenet.quantization.quantize import Quantize

# Of the outputs' variance. Int8 networks without trouble were seen to lose 0.005 to 0.33 %, 4-bit ones 5 % and more.
LOST = 0.02
# A remedy works when it leaves no more than that, or this share of what was lost.
_LEAVES = 0.1
_IMAGES, _CALIBRATED, _TRIALS = 32, 128, 6


def diagnose(step: Quantize, before: nn.Module, made: nn.Module, task: Task) -> list[str]:
    """What a quantization costs, where, and what was tried against it with its result; [] where it costs little.

    Args:
        step: how it was quantized.
        before, made: the model before and after.
        task: its calibration data are looked at.
    Returns:
        sentences: the cost, the places (quantization/verdicts.py), the remedies.
    """
    with torch.random.fork_rng(devices=[]):  # data may be shuffled; nothing else shall notice
        inputs = task.inputs_like(made, _IMAGES)
        wanted, found = _outputs(before, inputs), _outputs(made, inputs)
        loss = lost(wanted, found)
        if not loss > LOST:
            return []
        findings = look(made, task, _IMAGES)
        said = [_cost(loss, wanted, found), *findings.verdicts()]
        batches = list(task.calibration(min(step.samples, _CALIBRATED)))
        few = dataclasses.replace(task, calibrate=batches, test=None, quiet=True)
        return [*said, *_try(step, before, few, findings, loss, (inputs, wanted))]


def lost(wanted: list[Tensor], found: list[Tensor]) -> float:
    """Mean square of the error over the variance of what was wanted; of several outputs the worst.

    >>> lost([torch.tensor([[0.0, 2.0]])], [torch.tensor([[0.0, 1.0]])])
    0.5
    """
    shares = [0.0]
    for a, b in zip(wanted, found, strict=True):
        variance = float(a.double().var(correction=0))
        if variance > 0:  # what never changes has nothing to be measured by
            shares.append(float((b.double() - a.double()).square().mean()) / variance)
    return max(shares)


def remedies(step: Quantize, findings: Findings) -> list[tuple[str, Quantize]]:
    """(what to write, the step with it) of what may help against what was found, the cheapest first."""
    found: list[tuple[str, Quantize]] = []

    def add(words: str, **changes: Any) -> None:
        with contextlib.suppress(SettingsError):  # other settings of the step may not go with it
            found.append((words, dataclasses.replace(step, **changes)))

    if step.granularity != "channel":
        add("granularity: channel", granularity="channel")
    if step.activations not in (None, "int8"):
        add("activations: int8", activations="int8")
    if findings.cut_off and step.ranges != "minmax":
        add("ranges: minmax", ranges="minmax", percentile=type(step).percentile)
    if (findings.flushed or findings.ruined) and not step.equalise:
        add("equalise: true", equalise=True)
    if coarse := [path for path, bits in findings.bits.items() if bits < 8]:
        if step.rounding == "nearest":
            add("rounding: repaired with correct_bias: true", rounding="repaired", correct_bias=True)
        worst = sorted(coarse, key=findings.errors.__getitem__, reverse=True)[: -(-len(coarse) // 4)]
        words = ", ".join(f"{path}: int8" for path in worst)
        add(f"formats: {{{words}}}", formats={**dict.fromkeys(worst, "int8"), **step.formats})
    ruined = [path for path in findings.ruined if findings.bits.get(path) == 8]
    for count in sorted({min(1, len(findings.flushed)), len(findings.flushed)}):
        beside = [path for each in findings.flushed[:count] for path in (*each.makers, *each.readers)]
        left = list(dict.fromkeys([*beside, *ruined]))
        if left and 2 * len(left) <= len(findings.errors) + 1:
            add(f"skip: [{', '.join(left)}], which leaves these in float,", skip=(*step.skip, *left))
    if step.activations is not None:
        alone = {"activations": None, "percentile": type(step).percentile}
        ranges = step.ranges if step.ranges == "minmax" else "mse"
        add("activations: null, for a file as small and no faster,", ranges=ranges, **alone)
    if step.activations is not None or step.weights.startswith("int"):
        plain = {name: getattr(type(step), name) for name in ("ranges", "percentile", "granularity", "symmetric")}
        add(
            "weights: fp16 with activations: null, for a file of half the bytes,",
            weights="fp16", activations=None, rounding="auto", correct_bias=None, formats={}, **plain,
        )  # fmt: skip
    return found


def _try(
    step: Quantize, before: nn.Module, task: Task, findings: Findings, loss: float, judge: tuple[Any, list[Tensor]]
) -> list[str]:
    """Tries remedies until one works. What works is said with its figure; else what was tried in vain."""
    inputs, wanted = judge
    tried: list[tuple[float, str]] = []
    for words, other in remedies(step, findings)[:_TRIALS]:
        try:
            with unasked(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said of the step itself
                made, _ = other.run(copy.deepcopy(before), task)
            after = lost(wanted, _outputs(made, inputs))
        except TersenetError:
            continue  # what cannot be done is no remedy
        if after <= max(LOST, _LEAVES * loss):
            return [f"{words} brings that from {_percent(loss)} to {_percent(after)} (tried)"]
        tried.append((after, words))
    if not tried:
        return []
    vain = "; ".join(f"{words} leaves {_percent(after)}" for after, words in sorted(tried))
    return [f"tried, and no remedy: {vain}"]


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with evaluating(model), torch.no_grad():
        return floats(model(*inputs))


def _cost(loss: float, wanted: list[Tensor], found: list[Tensor]) -> str:
    images = len(wanted[0])
    other = ""
    if len(wanted) == 1 and wanted[0].dim() == 2 and wanted[0].shape[1] > 1:
        count = int((wanted[0].argmax(1) != found[0].argmax(1)).sum())
        other = f", and {count} of them get another class"
    return f"rounding costs {_percent(loss)} of the outputs' variance on {images} calibration images{other}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
