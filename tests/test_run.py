"""The run folder: continued where it stopped, refused when something is not the same, never half-written."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cases import Tiny, task_for, tiny
from tersenet.errors import DataError, ModelError, RunError, SettingsError, TersenetError
from tersenet.job import compress
from tersenet.recipe import Recipe
from tersenet.run import Journal, Run
from tersenet.step import Plan, Step
from tersenet.targets import Target
from tersenet.task import Task
from tersenet.train import Recover

pytestmark = pytest.mark.minutes

RECIPE = """
schema: 1
steps:
- prune_channels: {sparsity: 0.5}
- train: {epochs: 2, learning_rate: 0.01, with: [{soft_targets: {}}]}
- fold_batch_norm: {}
- quantize: {}
"""


def numbers(folder: Path) -> dict[str, torch.Tensor]:
    last = sorted(folder.glob("*.safetensors"))[-1]
    return load_file(last)


def job(folder: Path, model: nn.Module | None = None, recipe: str = RECIPE, **changes: Any) -> Run:
    model = tiny() if model is None else model
    task = dataclasses.replace(task_for(model), **changes)
    return compress(model, task, Recipe.parse(recipe), out=folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    job(folder)
    return folder


def test_a_finished_run_has_every_file(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"report.json", "report.html", "recipe.yaml", "model.terse", "model.onnx", "model.pt2", "README.md"} <= names
    assert {"01-prune_channels.json", "01-prune_channels.safetensors", "04-quantize.json"} <= names
    assert not [name for name in names if ".part" in name or name.endswith(".state")]
    assert list((finished / "logs" / "02-train").rglob("*.csv"))


def test_a_finished_run_says_what_it_is(finished: Path) -> None:
    run = Run(finished)
    assert [row["step"] for row in run.rows] == [
        "original", "1. prune_channels", "2. train", "3. fold_batch_norm", "4. quantize",
    ]  # fmt: skip
    assert run.rows[-1]["param_bytes"] < run.rows[0]["param_bytes"] / 3
    assert run.rows[1]["left_alone"][0]["reasons"][-1]["layers"] == ["linear"]
    assert "residual: true would allow" in run.rows[1]["left_alone"][0]["advice"]
    assert "left_alone" not in run.rows[0]
    for name in ("report.html", "README.md"):
        assert "the model's output" in (finished / name).read_text().replace("&#39;", "'")
    assert set(run.rows[-1]["scores"]) == {"pytorch", "onnxruntime"}
    for name, entry in run.report["files"].items():
        assert run.file(name).stat().st_size == entry["bytes"]
    assert run.verdict in repr(run)
    assert "<table>" in run._repr_html_()
    assert Recipe.read(finished / "recipe.yaml").dump() == (finished / "recipe.yaml").read_text()
    with pytest.raises(RunError, match=r"has no model\.tflite"):
        run.file("model.tflite")


def test_the_terse_file_is_the_model(finished: Path) -> None:
    x = task_for(tiny()).example
    model = Run(finished).model
    with torch.no_grad():
        again = torch.export.load(finished / "model.pt2").module()(x)
        assert torch.allclose(model(x), again, atol=1e-5)
    assert not isinstance(model, Tiny)


def test_called_again_it_does_nothing(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    job(finished)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


class Stop(Exception):
    """Stands for a cut."""


@pytest.mark.parametrize("after", [1, 2, 3])
def test_it_goes_on_after_a_cut_to_the_same_bits(after: int, finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    real, done = Journal.record, []

    def record(self: Journal, *args: Any) -> Any:
        if len(done) == after:
            raise Stop
        done.append(args[0])
        return real(self, *args)

    monkeypatch.setattr(Journal, "record", record)
    with pytest.raises(Stop):
        job(tmp_path / "run")
    monkeypatch.undo()
    steps = []
    monkeypatch.setattr(Journal, "record", lambda self, *args: steps.append(args[0]) or real(self, *args))
    job(tmp_path / "run")
    assert steps == list(range(after + 1, 5))
    expected, got = numbers(finished), numbers(tmp_path / "run")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def copy_of(folder: Path, to: Path) -> Path:
    import shutil

    shutil.copytree(folder, to)
    return to


def test_another_recipe_model_data_or_seed_is_refused(finished: Path) -> None:
    with pytest.raises(RunError, match="another recipe"):
        job(finished, recipe=RECIPE.replace("0.5", "0.25"))
    with pytest.raises(RunError, match="another starting model"):
        job(finished, tiny(5))
    with pytest.raises(RunError, match="another seed"):
        job(finished, seed=3)
    with pytest.raises(RunError, match="another data"):
        job(finished, example=torch.ones(2, 3, 12, 12))


def test_damage_is_named(finished: Path, tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path / "a")
    data = bytearray((folder / "02-train.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "02-train.safetensors").write_bytes(bytes(data))
    with pytest.raises(RunError, match=r"02-train\.safetensors is damaged"):
        job(folder)
    folder = copy_of(finished, tmp_path / "b")
    (folder / "03-fold_batch_norm.json").write_text("{")
    with pytest.raises(RunError, match=r"03-fold_batch_norm\.json is damaged"):
        job(folder)
    folder = copy_of(finished, tmp_path / "c")
    (folder / "01-prune_channels.safetensors").unlink()
    with pytest.raises(RunError, match="numbers are missing"):
        job(folder)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").write_text("photos")
    with pytest.raises(RunError, match="holds no run of ours"):
        job(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.txt"]


def test_opening_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        Run(tmp_path)
    with pytest.raises(RunError, match="there is no folder"):
        Run(tmp_path / "nowhere")


def test_a_full_disk_leaves_a_run_that_can_go_on(finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    real = os.fsync
    count = 0

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TersenetError, match="the disk is full") as caught:
        job(tmp_path / "run")
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert not list((tmp_path / "run").rglob("*.part*"))
    job(tmp_path / "run")
    assert all(torch.equal(value, numbers(tmp_path / "run")[key]) for key, value in numbers(finished).items())


def test_users_without_labels_are_told_what_remains(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="these steps remain: prune_channels, fold_batch_norm, quantize"):
        job(tmp_path / "a", train=None)
    with pytest.raises(DataError, match=r"no data for train, quantize; .* remain: prune_channels, fold_batch_norm"):
        job(tmp_path / "b", train=None, calibrate=None)


def test_recovery_by_the_users_own_loop(tmp_path: Path) -> None:
    seen = []

    def recover(model: nn.Module, task: Task) -> None:
        seen.append(task.original)
        with torch.no_grad():
            model.linear.bias.zero_()

    model = tiny()
    run = compress(
        model,
        task_for(model),
        Recipe.parse("steps: [{prune_channels: {}}, {train: {epochs: 3}}]"),
        out=tmp_path / "run",
        recover=recover,
    )
    assert [row["step"] for row in run.rows][-1] == "2. recover"
    assert len(seen) == 1
    assert bool((numbers(tmp_path / "run")["linear.bias"] == 0).all())


@pytest.mark.parametrize(
    "recipe",
    [
        "search: {macs: 0.9x, steps: [prune_channels: {}, train: {epochs: 3}]}",
        "repeat: {until_drop: null, at_most: 1, steps: [prune_channels: {}, train: {epochs: 3}]}",
    ],
    ids=["search", "repeat"],
)
def test_the_users_own_loop_takes_the_place_of_trainings_inside_of_steps(recipe: str, tmp_path: Path) -> None:
    calls = []
    model = tiny()
    compress(
        model, task_for(model), Recipe.parse(f"steps: [{recipe}]"), out=tmp_path / "run",
        recover=lambda model, task: calls.append(model),
    )  # fmt: skip
    assert len(calls) == 1


def test_a_loop_that_would_never_be_called_is_refused(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(SettingsError, match="no step of the recipe trains; add a train step"):
        compress(model, task_for(model), "int8", out=tmp_path / "run", recover=lambda model, task: None)


def test_a_loader_in_place_of_a_task_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="task is of type list; make a Task of it"):
        compress(tiny(), [torch.zeros(2, 3, 8, 8)], "int8", out=tmp_path / "run")  # type: ignore[arg-type]


def test_the_users_own_loop_is_known_again_by_its_code() -> None:
    def made(rate: float) -> Recover:
        return Recover(recover=eval(f"lambda model, task: {rate}"))

    assert repr(made(0.1)) == repr(made(0.1))
    assert repr(made(0.1)) != repr(made(0.2))
    assert " at 0x" not in repr(made(0.1))


def test_a_target_that_is_missed_is_reported_as_missed(tmp_path: Path) -> None:
    model = tiny()
    recipe = Recipe.parse("steps: [{prune_channels: {sparsity: 0.25}}]")
    run = compress(model, task_for(model), recipe, out=tmp_path / "run", target=Target(macs="0.1x"), max_drop=90.0)
    assert not run.met
    assert [target["met"] for target in run.report["targets"]] == [False, True]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Breaks(Step):
    def plan(self, model: nn.Module, task: Task) -> Plan:
        raise ModelError("it cannot be done")


def test_an_error_keeps_what_was_finished(tmp_path: Path) -> None:
    model = tiny()
    steps = Recipe.parse("steps: [{prune_channels: {}}]").steps
    with pytest.raises(ModelError, match="breaks: it cannot be done"):
        compress(model, task_for(model), (*steps, Breaks()), out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "01-prune_channels.json").read_text())["step"] == "prune_channels"
    assert not (tmp_path / "run" / "report.json").exists()


def test_a_run_that_failed_at_once_can_be_started_anew(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(ModelError):
        compress(model, task_for(model), (Breaks(),), out=tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "files"}  # those of the original
    steps = Recipe.parse("steps: [{prune_channels: {}}]").steps
    assert compress(model, task_for(model), steps, out=tmp_path / "run").met
