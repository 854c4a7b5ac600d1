"""`pack` under a budget: a drop, bytes, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import tersenet as package
from cases import task_for, tiny
from command import tersenet
from tersenet.deploy.artifact import load_terse
from tersenet.packing import pack_within
from tersenet.task import score_model


def test_bytes_of_the_file_are_met_and_nearly_used(tmp_path: Path) -> None:
    model = tiny()
    found = pack_within(model, task_for(model), tmp_path / "a.terse", bytes=2300)
    assert found["bytes"] == (tmp_path / "a.terse").stat().st_size
    assert 1900 < found["bytes"] <= 2300
    assert found["float32_bytes"] == 4 * sum(p.numel() for p in model.parameters())


def test_a_drop_is_chosen_and_then_held_against_the_test_set(tmp_path: Path) -> None:
    model = tiny()
    task = task_for(model)
    found = pack_within(model, task, tmp_path / "a.terse", max_drop=3.0)
    assert found["judged_drop"] <= 3.0
    file = load_terse(tmp_path / "a.terse")
    assert found["score"] == score_model(file, task, task.test).value  # type: ignore[arg-type]
    assert found["drop"] == pytest.approx(100 * (found["original_score"] - found["score"]), abs=1e-6)
    assert found["met"] == (found["drop"] <= 3.0)
    assert found["bytes"] < 0.25 * found["float32_bytes"]


def test_without_data_bytes_can_be_asked_for(tmp_path: Path) -> None:
    model = tiny()
    blind = dataclasses.replace(task_for(model), train=None, calibrate=None, test=None)
    found = pack_within(model, blind, tmp_path / "a.terse", bytes="0.25x")
    assert found["bytes"] <= 0.25 * found["float32_bytes"]
    assert "score" not in found


@pytest.mark.minutes
def test_the_command(digits_weights: Path, tmp_path: Path) -> None:
    line = ("pack", "digits", "--weights", digits_weights, "--data", "digits", "-o", tmp_path / "d.terse", "--json")
    ended = tersenet(*line, "--max-drop", "5")
    assert ended.code == (0 if ended.json["met"] else 1)
    assert ended.json["bytes"] < 0.3 * ended.json["float32_bytes"]
    assert ended.json["samples"] > 100
    assert package.load(tmp_path / "d.terse") is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--max-drop", "1"), "with --data"),
        (("--max-drop", "1", "--bytes", "0.1x", "--data", "digits"), "not both"),
        (("--bytes", "lots"), "bytes must be"),
        (("--max-drop", "-1", "--data", "digits"), "max_drop must be"),
    ],
)
def test_what_is_refused(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    ended = tersenet("pack", "digits", "-o", tmp_path / "x.terse", *options)
    assert ended.code == 2
    assert said in ended.err
    assert not (tmp_path / "x.terse").exists()
