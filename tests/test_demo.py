"""The demo, whole: what the issue promises of it, except its timings, which depend on the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from command import tersenet
from tersenet.recipe import Recipe
from tersenet.report.report import validate

# Every file that a finished run folder holds.
PROMISED = (
    "report.json", "report.html", "recipe.yaml", "README.md", "model.terse", "model.onnx", "model.pt2", "run.json",
)  # fmt: skip


@pytest.mark.minutes
def test_the_demo(tmp_path: Path) -> None:
    ended = tersenet("demo", "--out", tmp_path / "demo", "--json")
    assert ended.code == 0, ended.err
    report = ended.json
    for name in PROMISED:
        assert (tmp_path / "demo" / name).stat().st_size > 0, name
    first, last = report["rows"][0], report["rows"][-1]
    assert first["params"] <= 100_000
    assert first["macs"] <= 5_000_000
    assert first["score"] >= 0.97
    assert 100 * (first["score"] - last["score"]) <= 1
    assert first["samples"] == last["samples"] == 359
    size = report["files"]["model.terse"]["bytes"]
    assert size == (tmp_path / "demo" / "model.terse").stat().st_size
    assert 4 * size <= first["file_bytes"]["onnx"]
    assert 4 * report["files"]["model.onnx"]["bytes"] <= first["file_bytes"]["onnx"]
    assert all(target["met"] for target in report["targets"])
    assert report["targets"]
    # The report is whole and can be replayed.
    validate({key: value for key, value in report.items() if key != "run"})
    assert [step.name for step in Recipe.read(tmp_path / "demo" / "recipe.yaml").steps] == [
        "prune_channels", "train", "fold_batch_norm", "quantize",
    ]  # fmt: skip
    # Called again, it goes on where it stopped: at the end.
    again = tersenet("demo", "--out", tmp_path / "demo", "--json")
    assert again.json == report
    assert "training a small net" not in again.err
