"""Calibration data from which no ranges can be learnt: said in one sentence, or refused."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tersenet import Preparation, Quantize, Task, compress
from tersenet.errors import DataError, InputWarning
from tersenet.findings import collecting
from tersenet.quantization.calibration_data import unfit
from tersenet.quantization.quantize_aware import QuantizeAware

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(64) % 4
CLASSES = Preparation((8, 8), labels=("ant", "bee", "cat", "dog"))
# What a black image is after the usual preparation: another value in each channel.
BLACK = torch.tensor([-1.0, -2.0, -0.5]).reshape(1, 3, 1, 1).expand(32, 3, 8, 8)
CASES = {
    "black": (BLACK, None, "all 32 calibration images are of one plain color"),
    "plain": (torch.rand(32, 3, 1, 1).expand(32, 3, 8, 8), None, "all 32 calibration images are of one plain color"),
    "one black": (BLACK[:1], None, "the calibration image is of one plain color"),
    "one": (X[:1], None, "there is 1 calibration sample"),
    "the same": (X[:1].expand(32, 3, 8, 8), None, "all 32 calibration samples are the same one"),
    "one class": (X[:32], torch.full((32,), 2), "of one class (cat)"),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()


def task(x: Tensor, y: Tensor | None = None) -> Task:
    batches = [(part,) if y is None else (part, y[i * 16 : i * 16 + 16]) for i, part in enumerate(x.split(16))]
    return Task(example=X[:2], calibrate=batches, preparation=CLASSES, quiet=True)


@pytest.mark.parametrize("name", CASES)
def test_what_teaches_no_ranges_is_said(name: str) -> None:
    x, y, said = CASES[name]
    with collecting() as found, pytest.warns(InputWarning, match=said.replace("(", r"\(").replace(")", r"\)")):
        Quantize().run(model(), task(x, y))
    assert said in found[0], "for the report"


def test_trained_ranges_are_held_to_the_same() -> None:
    step = QuantizeAware(weights="int4", activations="int4")
    made = step.apply(model(), step.plan(model(), task(BLACK)))
    with pytest.warns(InputWarning, match="plain color"):
        step.fit(made, task(BLACK))


def test_of_sound_data_nothing_is_said() -> None:
    assert unfit(task(X, Y), 512) is None
    assert unfit(task(X[:2]), 512) is None
    half = torch.cat([BLACK[:16], X[:16]])
    assert unfit(task(half), 512) is None
    # Labels that mean nothing, where there are no names for them.
    assert unfit(Task(example=X[:2], calibrate=[(X, torch.zeros(64).long())]), 512) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Quantize(activations=None).run(model(), task(BLACK))  # which learns nothing from them


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    x = X.clone()
    x[40, 0, 0, 0] = value
    with pytest.raises(DataError, match="calibration batch 2 holds NaN or infinite values; remove them"):
        Quantize().run(model(), task(x))


def test_a_run_keeps_it_in_its_report(tmp_path: Path) -> None:
    with pytest.warns(InputWarning, match="plain color"):
        run = compress(model(), task(BLACK), [Quantize()], out=tmp_path / "run")
    assert any(text.startswith("quantize: all 32 calibration images") for text in run.report["warnings"])
