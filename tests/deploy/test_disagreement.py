"""A profile whose rows do not add up to the latency: it is measured again, and the reason is said."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from tersenet.deploy import profile
from tersenet.deploy.disagreement import why_apart
from tersenet.deploy.profile_table import ProfileTable
from tersenet.deploy.timings import Measurement

X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def measured(plain: list[float], profiled: list[float]) -> Measurement:
    turns = {"plain": plain, "profiled": profiled}
    return Measurement({(name, "pytorch"): np.asarray(each) for name, each in turns.items()})


@pytest.mark.parametrize(
    ("plain", "profiled", "rows", "said"),
    [
        ([1.0] * 20, [1.1] * 20, 0.9, None),
        ([4.0] * 20, [4.2] * 20, 1.0, "passes outside of operators"),
        ([1.1] + [4.0] * 19, [4.2] * 20, 1.0, "the fastest turn took 1.100 ms"),
        ([4.0] * 20, [1.1] * 20, 1.0, "runs faster there"),
        ([1.0] * 20, [4.5] * 20, 4.0, "its own cost is in the times of the 7 operators"),
        ([1.0] * 20, [1.2] * 20, 4.0, "were disturbed less"),
        ([1.0] * 20, [1.2] * 20, 0.0, None),
    ],
)
def test_what_is_said(plain: list[float], profiled: list[float], rows: float, said: str | None) -> None:
    found = why_apart(measured(plain, profiled), rows, 7, "pytorch")
    if said is None:
        assert found is None
    else:
        assert found is not None
        assert said in found
        assert "measured twice" in found


class _Fixed(profile._TorchProfiler):
    """Rows of 1 ms in all; of 0.25 ms, the first `wrong_ones` of the profilers that are opened."""

    opened = 0
    wrong_ones = 2

    def __init__(self, graph: Any) -> None:
        super().__init__(graph)
        type(self).opened += 1
        self.total = 0.25 if self.opened <= self.wrong_ones else 1.0

    def times(self) -> Any:
        keys = super().times()
        return {key: [self.total / len(keys)] for key in keys}


@pytest.mark.parametrize(("wrong_ones", "opened"), [(0, 1), (1, 2), (2, 2)])
def test_a_planted_disagreement(monkeypatch: pytest.MonkeyPatch, wrong_ones: int, opened: int) -> None:
    """Rows that hold a quarter of the latency: right at the second try, or said."""

    def measure(contenders: Any, **settings: Any) -> Measurement:
        for each in contenders:
            each.call(each.x)
        return measured([1.0] * 20, [1.1] * 20)

    monkeypatch.setattr(profile, "_TorchProfiler", _Fixed)
    monkeypatch.setattr(profile, "measure", measure)
    monkeypatch.setattr(_Fixed, "opened", 0)
    monkeypatch.setattr(_Fixed, "wrong_ones", wrong_ones)
    found = profile.profile_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), X, runtime="pytorch")
    assert _Fixed.opened == opened
    console = Console(width=200, record=True, force_terminal=False, file=io.StringIO())
    console.print(ProfileTable(found))
    text = " ".join(console.export_text().split())
    if wrong_ones < 2:
        assert found["disagreement"] is None
        assert found["totals"]["ms"] == pytest.approx(1.0)
        assert "times apart" not in text
    else:
        assert "4.0 times apart, measured twice" in found["disagreement"]
        assert "outside of operators" in found["disagreement"]
        assert found["disagreement"] in text
