"""Latency tables that travel, with made-up times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from residual_net import residual_net, residual_task
from tersenet.search.bench import Bench
from tersenet.search.search import Search
from tersenet.search.sites import Picks
from tersenet.search.table import Table
from tersenet.tables import fill_table, table_lines
from tersenet.targets import Target, recipe_of

pytest.importorskip("onnxruntime")
pytest.importorskip("scipy")
pytestmark = pytest.mark.minutes


def test_a_table_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """What `table` writes has all that a search of the same model asks for."""
    monkeypatch.setenv("TERSENET_CACHE", str(tmp_path / "cache"))

    def milliseconds(bench: Bench, picks: Picks) -> float:
        return 0.05 + bench.weight(picks, "macs") * 1e-6

    def times(bench: Bench, candidates: Sequence[Picks], said: str, keep: Any = None) -> list[tuple[float, float]]:
        whole = milliseconds(bench, {})
        return [(milliseconds(bench, picks), milliseconds(bench, picks) / whole) for picks in candidates]

    monkeypatch.setattr(Bench, "times", times)
    monkeypatch.setattr(Bench, "base_times", lambda bench: (milliseconds(bench, {}), 3 * milliseconds(bench, {})))
    model = residual_net()
    task = residual_task(model)
    out = tmp_path / "far" / "device.json"
    found = fill_table(model, task, out, "onnxruntime", 1, 1)
    table = Table.read(out)
    assert found["file"] == str(out)
    assert found["device"] == table.device
    assert found["entries"] == len(table.changes) > 10
    assert found["checks"] == 20
    assert 0 <= found["error"] < 0.05
    assert str(out) in table_lines(found)
    assert "with 1 thread at batch 1" in table_lines(found)
    assert "with 2 threads" in table_lines({**found, "device": {**table.device, "threads": 2}})
    # Here nothing may be timed any more.
    monkeypatch.setattr(Bench, "times", lambda bench, candidates, said: [][: len(candidates)])
    monkeypatch.setattr(Bench, "base_times", None)
    recipe = recipe_of(target=Target(latency="0.2x"), data="random:3x8x8", table=out)
    search = recipe.steps[0]
    assert isinstance(search, Search)
    solved = search.solve(model, task)
    assert solved.met
    assert solved.said["original"] == pytest.approx(3 * solved.said["unchanged"])
    assert Table.read(out) == table
    assert capfd.readouterr().out == ""
