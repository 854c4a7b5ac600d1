"""Timing many candidates takes no longer than it should, and says how far it is."""

from __future__ import annotations

import gc
import io
from pathlib import Path
from typing import Any

import pytest
import rich.console

from tersenet.progress import progressing
from tersenet.search.bench import _ALL_S, _TURN_S, _TURNS, Bench


class Result:
    def ratio(self, name: str, base: str) -> Any:
        return type("Ratio", (), {"ratio": 0.5})

    def latency(self, name: str) -> dict[str, float]:
        return {"median": 1.0 + int(name)}


def bench_of(folder: Path, monkeypatch: pytest.MonkeyPatch, turns: list[float]) -> Bench:
    bench = object.__new__(Bench)
    bench.folder, bench.base_path, bench.progress = folder, folder / "base.onnx", False
    monkeypatch.setattr(Bench, "file", lambda self, picks: b"")

    def measured(self: Bench, paths: dict[str, Path], turn: float) -> Result:
        assert gc.get_freeze_count() > 0  # what is in memory is looked at once, not at each measurement
        turns.extend([turn] * (len(paths) - 1))
        return Result()

    monkeypatch.setattr(Bench, "_measure", measured)
    return bench


@pytest.mark.parametrize(("count", "turn"), [(5, _TURN_S), (79, _TURN_S), (400, _ALL_S / _TURNS / 400)])
def test_many_candidates_share_a_limit(
    count: int, turn: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[float] = []
    kept: list[int] = []
    bench = bench_of(tmp_path, monkeypatch, turns)
    found = bench.times([{}] * count, "timing", lambda known: kept.append(len(known)))
    assert len(found) == count
    assert turns == [pytest.approx(turn)] * count
    assert sum(turns) * _TURNS <= _ALL_S * 1.001
    assert kept[0] <= 10  # what is measured is kept group by group
    assert kept[-1] == count
    assert gc.get_freeze_count() == 0


def test_the_bar_says_how_many_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = io.StringIO()
    real = rich.console.Console
    monkeypatch.setattr(
        rich.console, "Console", lambda **_: real(file=drawn, force_terminal=True, width=80, color_system=None)
    )
    with progressing("filling", 20, True) as advance:
        advance(5)
        advance(5)
    assert "filling" in drawn.getvalue()
    assert "10/20" in drawn.getvalue()
    assert "0:00:0" in drawn.getvalue()
    before = len(drawn.getvalue())
    for total, shown in ((20, False), (1, True)):
        with progressing("filling", total, shown) as advance:
            advance(1)
    assert len(drawn.getvalue()) == before
