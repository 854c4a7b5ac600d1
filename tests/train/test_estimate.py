"""The estimate of a training's length: said once, refused beyond the limit."""

from __future__ import annotations

import pytest

from tersenet.errors import SettingsError
from tersenet.train.estimate import Estimate


def watched(seconds_per_batch: float, batches: int, limit: float | None, quiet: bool = False) -> None:
    now = iter(seconds_per_batch * tick for tick in range(1000))
    times: list[float] = []

    def clock() -> float:
        return times[-1]

    watch = Estimate(batches, 100, limit, quiet, clock)
    for _ in range(60):
        times.append(next(now))
        watch.batch()


def test_it_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    watched(2.0, 1820, None)
    said = capsys.readouterr().err
    assert said == "about 1.0 h of training\n"  # 1,800 batches of 2 s are left after the 20th


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    watched(2.0, 1820, None, quiet=True)
    assert capsys.readouterr().err == ""


def test_more_than_allowed_is_refused_with_what_would_fit() -> None:
    with pytest.raises(SettingsError, match=r"about 1\.0 h, and max_hours is 0\.5; 9 epochs would fit"):
        watched(2.0, 1820, 0.5)
    with pytest.raises(SettingsError, match="not one epoch would fit"):
        watched(2.0, 1820, 0.01)


def test_just_enough_is_allowed() -> None:
    watched(2.0, 1820, 1.0)
