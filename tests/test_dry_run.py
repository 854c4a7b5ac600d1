"""The dry run: shapes and times of a recipe, with no training and no look at the test set."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from cases import task_for, tiny
from tersenet.dry_run import _verdict, dry_run, dry_run_table, without_training
from tersenet.errors import SettingsError
from tersenet.graph.costs import totals
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.quantization.quantize import Quantize
from tersenet.recipe import Recipe
from tersenet.repeat import Repeat
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.step import Chain
from tersenet.train import Train

RECIPE = Recipe((PruneChannels(sparsity=0.5), Train(epochs=50), FoldBatchNorm(), Quantize()))


class Untouchable:
    """A test set that nobody may read."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the test set was read")


def test_training_is_taken_out_at_any_depth() -> None:
    fold, train = FoldBatchNorm(), Train(epochs=1)
    assert without_training(train) is None
    assert without_training(fold) is fold
    assert without_training(Chain(steps=(train, fold, Chain(steps=(train,))))) == Chain(steps=(fold,))
    assert without_training(Chain(steps=(train, Chain(steps=(train,))))) is None
    assert without_training(Repeat(steps=(train, fold))) == Chain(steps=(fold,))
    assert without_training(Repeat(steps=(train,))) is None


@pytest.fixture(scope="module")
def planned() -> dict[str, Any]:
    model = tiny()
    task = dataclasses.replace(task_for(model), test=Untouchable())
    before = copy.deepcopy(model.state_dict())
    found = dry_run(model, task, RECIPE, batch=2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert task.original is model
    assert isinstance(task.test, Untouchable)
    return found


@pytest.mark.minutes
def test_rows_say_what_running_the_steps_gives(planned: dict[str, Any]) -> None:
    rows = planned["rows"]
    assert [row["step"] for row in rows] == ["original", "1. prune_channels", "2. fold_batch_norm", "3. quantize"]
    assert planned["left_out"] == ["train"]
    model = tiny()
    task = task_for(model)
    for row, step in zip(rows, (None, PruneChannels(sparsity=0.5), FoldBatchNorm(), Quantize()), strict=True):
        if step is not None:
            model, _ = step.run(model, task)
        cost = totals(model, task.example)
        assert (row["params"], row["macs"]) == (cost.params, cost.macs)
        assert row["file_bytes"]["terse"] > 0
        assert row["file_bytes"]["onnx"] > 0
        latency = row["latency_ms"]["onnxruntime"]
        assert latency["batch"] == 2
        assert 0 < latency["low"] <= latency["median"] <= latency["high"]
    assert "left_of_previous" not in rows[0]["latency_ms"]["onnxruntime"]
    assert len(rows[1]["latency_ms"]["onnxruntime"]["left_of_previous"]) == 3


@pytest.mark.minutes
@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits(planned: dict[str, Any], width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(dry_run_table(planned))
    text = console.export_text()
    assert "2. fold_batch_norm" in text
    assert "not run: train" in text
    assert max(map(len, text.splitlines())) <= width


def test_notes_stand_below_the_table_in_whole_lines() -> None:
    note = (
        "onnxruntime leaves 3 operators of the int8 file in float: Softmax, LayerNormalization, Gelu; skip the layers"
    )
    latency = {runtime: {"median": 0.01234} for runtime in ("onnxruntime", "openvino")}
    row = {"params": 10, "macs": 20, "file_bytes": {"onnx": 100, "terse": 50}, "latency_ms": latency, "notes": []}
    rows = [{"step": "original", **row}, {"step": "1. prune_channels", **row, "notes": [note]}]
    found = {"rows": rows, "left_out": [], "foreseen": [], "search": None, "targets": []}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(dry_run_table(found))
    lines = console.export_text().splitlines()
    assert lines[0].split()[:4] == ["step", "params", "MACs", ".onnx"]
    assert lines[2].split() == ["1.", "prune_channels", "10", "20", "100", "B", "0.0123", "0.0123"]
    assert " ".join(" ".join(lines[3:]).split()) == f"1. prune_channels: {note}"
    assert len(lines[3]) > 60


@pytest.mark.parametrize(
    ("interval", "macs", "said"),
    [
        ((0.5, 0.4, 0.6), 50, []),
        ((1.3, 1.2, 1.4), 50, ["1.30x slower in onnxruntime: does not pay here"]),
        ((1.0, 0.99, 1.01), 50, ["fewer multiply-adds but no faster in onnxruntime"]),
        ((1.0, 0.99, 1.01), 100, []),
    ],
)
def test_what_does_not_pay_is_said(interval: tuple[float, float, float], macs: int, said: list[str]) -> None:
    ratio = SimpleNamespace(ratio=interval[0], low=interval[1], high=interval[2])
    assert _verdict({"macs": macs}, {"macs": 100}, "onnxruntime", ratio) == said


def test_an_unknown_runtime_comes_first() -> None:
    model = tiny()
    with pytest.raises(SettingsError, match="unknown runtime 'abacus'"):
        dry_run(model, task_for(model), RECIPE, runtimes=("abacus",))
