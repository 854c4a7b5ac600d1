"""Timing many candidates takes no longer than it should, and says how far it is."""

from __future__ import annotations

import gc
import io
from pathlib import Path

import pytest
import rich.console

from tersenet.progress import progressing
from tersenet.search.bench import _ALL_S, _TURN_S, _TURNS, Bench


class Result:
    """Files take 1 ms; of the openings of the unchanged network one is unlucky with its memory."""

    def latency(self, name: str) -> dict[str, float]:
        return {"median": {"base 0": 2.4, "base 1": 2.0, "base 2": 1.99}.get(name, 1.0)}


def bench_of(folder: Path, monkeypatch: pytest.MonkeyPatch, turns: list[float]) -> Bench:
    bench = object.__new__(Bench)
    bench.folder, bench.base_path, bench.progress = folder, folder / "base.onnx", False
    monkeypatch.setattr(Bench, "file", lambda self, picks: b"")

    def measured(self: Bench, paths: dict[str, Path], turn: float) -> Result:
        assert gc.get_freeze_count() > 0  # what is in memory is looked at once, not at each measurement
        files = [name for name, path in paths.items() if path != self.base_path]
        assert len(paths) == len(files) + 3
        assert files == sorted(files, key=int)
        turns.extend([turn] * len(files))
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
    assert found == [(1.0, 0.5)] * count, "shares are of the median of what the unchanged network took"
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
