"""Files are independent of each other, what can be foreseen is said first, and scores follow the data they rest on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import Tiny, task_for, tiny
from tersenet.deploy import graph_json
from tersenet.deploy.artifact import load_terse, save_terse
from tersenet.dry_run import dry_run, dry_run_table
from tersenet.errors import ExportError, RunError, SettingsError, TraceError
from tersenet.gate import gate
from tersenet.job import compress
from tersenet.recipe import Recipe
from tersenet.scored_on import data_digest, scored_on
from tersenet.ship import foresee_files, ship
from tersenet.step import Plan, Step
from tersenet.task import Task

FOLD = Recipe.parse("steps: [{fold_batch_norm: {}}]")


class Unlisted(Tiny):
    """Computes with an operator that a .terse file may not hold."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + 0 * torch.sinh(y / 8)


@pytest.fixture
def unlisted(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(graph_json, "ATEN", frozenset(graph_json.ATEN) - {"aten.sinh.default"})
    return Unlisted().eval()


class Never(Step):
    """Fails the test when it is reached."""

    needs = "nothing"

    def plan(self, model: nn.Module, task: Task) -> Plan:
        raise AssertionError("a step ran")


def short(model: nn.Module, **changes: Any) -> Task:
    return dataclasses.replace(task_for(model), **{"quiet": True, **changes})


def test_recurrent_layers_are_written_in_every_format(tmp_path: Path) -> None:
    class Rows(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            torch.manual_seed(0)
            layers = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
            self.rows, self.head = layers[kind](24, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rows(x.permute(0, 2, 1, 3).flatten(2))[0][:, -1])

    x = torch.randn(4, 3, 8, 8)
    for kind in ("gru", "rnn"):
        model = Rows(kind).eval()
        assert torch.equal(load_terse(save_terse(model, x, tmp_path / f"{kind}.terse"))(x), model(x))
    task = Task(example=x, test=[(x, torch.tensor([0, 1, 2, 3]))], calibrate=[x], quiet=True)
    shipped = ship(Rows("lstm"), task, tmp_path, "lstm", ["onnxruntime"])
    assert set(shipped.files) == {"terse", "onnx"}
    assert shipped.agreements["onnxruntime"].max_abs_error < 1e-5


@pytest.mark.minutes
def test_one_that_cannot_be_written_is_said_and_the_others_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unlisted: nn.Module
) -> None:
    monkeypatch.setattr("tersenet.ship.export_onnx", _refuse)
    model = unlisted
    run = compress(model, short(model, quiet=False), FOLD, out=tmp_path / "run", runtimes=["pytorch", "onnxruntime"])
    said = capsys.readouterr().err
    assert "there will be no .terse file: operator aten.sinh.default" in " ".join(said.split())
    assert set(run.report["files"]) == {"model.pt2"}
    assert set(run.report["not_written"]) == {"model.terse", "model.onnx"}
    assert "sinh" in run.report["not_written"]["model.terse"]
    assert run.report["not_written"]["model.onnx"] == "not today"
    assert [note for note in run.report["warnings"] if note.startswith("no .onnx file: not today")]
    assert set(run.rows[-1]["latency_ms"]) == {"pytorch"}
    assert "of the bytes" in run.verdict
    assert "pytorch" in run.verdict.lower()
    for page in ("README.md", "report.html"):
        assert "not today" in (tmp_path / "run" / page).read_text()
    x = short(model).example
    assert torch.allclose(run.model(x), model(x), atol=1e-5)
    assert gate(tmp_path / "run", max_bytes="5x")["targets"][0]["what"] == "bytes of model.pt2"


def _refuse(*args: Any, **kwargs: Any) -> Path:
    raise ExportError("not today")


def test_the_file_that_is_scored_must_be_there_before_a_step_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersenet.ship.export_onnx", _refuse)
    model = tiny()
    with pytest.raises(ExportError, match=r"the \.onnx file, which onnxruntime reads, cannot be had: not today"):
        compress(model, short(model), (Never(),), out=tmp_path / "run")
    with pytest.raises(ExportError, match="not today"):
        dry_run(model, short(model), Recipe((Never(),)))


def test_what_cannot_be_captured_is_said_before_a_step_runs(tmp_path: Path) -> None:
    class Decides(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) > 0 else x

    with pytest.raises(TraceError, match="depends on the values"):
        compress(Decides().eval(), short(tiny()), (Never(),), out=tmp_path / "run")


def test_a_plan_says_it_too(unlisted: nn.Module) -> None:
    model = unlisted
    found = dry_run(model, short(model), FOLD)
    assert [row["file_bytes"].keys() for row in found["rows"]] == [{"onnx"}] * 2
    assert "sinh" in found["foreseen"][0]
    assert dry_run_table(found) is not None
    assert foresee_files(tiny(), short(tiny())) == []


# ------------------------------------------------------------------------------------------------- what scores rest on


@pytest.mark.minutes
def test_another_test_set_is_scored_anew_and_the_steps_are_kept(tmp_path: Path) -> None:
    model = tiny()
    task = short(model)
    data = list(task.test)  # type: ignore[union-attr]
    first = compress(model, dataclasses.replace(task, test=data), FOLD, out=tmp_path / "run")
    before = (tmp_path / "run" / "01-fold_batch_norm.json").stat().st_mtime_ns
    moved = [(x, (y + 1) % 4) for x, y in data]
    again = compress(model, dataclasses.replace(task, test=moved), FOLD, out=tmp_path / "run")
    by_hand = torch.cat([model(x).argmax(1) == y for x, y in moved]).double().mean()
    for row in again.rows:
        assert row["score"] == pytest.approx(float(by_hand))
        assert row["scores"] == {"pytorch": row["score"], "onnxruntime": row["score"]}
    assert again.rows[-1]["score"] != first.rows[-1]["score"]
    assert (tmp_path / "run" / "01-fold_batch_norm.json").stat().st_mtime_ns == before
    written = (tmp_path / "run" / "report.json").stat().st_mtime_ns
    compress(model, dataclasses.replace(task, test=moved), FOLD, out=tmp_path / "run")
    assert (tmp_path / "run" / "report.json").stat().st_mtime_ns == written  # finished already


def test_another_held_out_set_is_another_run(tmp_path: Path) -> None:
    model = tiny()
    task = short(model, test=None)
    held = list(short(model).test)  # type: ignore[arg-type]
    compress(model, dataclasses.replace(task, validate=held), FOLD, out=tmp_path / "run")
    with pytest.raises(RunError, match="holds a run with another held-out set"):
        compress(model, dataclasses.replace(task, validate=held[:1]), FOLD, out=tmp_path / "run")
    # Folders from before this was kept, of runs without a held-out set, go on.
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    del manifest["held-out set"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest))
    compress(model, dataclasses.replace(task, validate=None), FOLD, out=tmp_path / "run")


def test_what_a_score_rests_on_is_known_again() -> None:
    x, y = torch.arange(24.0).reshape(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    task = Task(example=x, test=[(x[:3], y[:3]), (x[3:], y[3:])])
    basis = scored_on(task)
    assert scored_on(Task(example=x)) is None
    assert basis == scored_on(dataclasses.replace(task, test=[(x[:3].clone(), y[:3]), (x[3:], y[3:])]))
    others = [
        {"test": [(x[:3], y[:3]), (x[3:], y[3:].flip(0))]},
        {"test": [(x[:3], y[:3])]},
        {"test": [(x[:3], y[:3]), (x[3:] + 1, y[3:])]},
        {"metric": lambda outputs, batch: outputs[:, 0]},
        {"metric": lambda outputs, batch: outputs[:, 1]},
        {"forward": lambda model, batch: model(batch[0]) * 2},
    ]
    found = [scored_on(dataclasses.replace(task, **change)) for change in others]
    assert len({basis, *found}) == 1 + len(others)
    state = torch.random.get_rng_state()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2, shuffle=True)
    assert data_digest(loader) == data_digest(loader)
    assert torch.equal(torch.random.get_rng_state(), state)


# -------------------------------------------------------------------------------------------------- several inputs


class Pair(nn.Module):
    """Token ids (N, 6) and an image (N, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv, self.norm = nn.Embedding(700, 8), nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.norm.running_mean.normal_()

    def forward(self, ids: Tensor, x: Tensor) -> dict[str, Tensor]:
        features = self.embed(ids).mean(1) + torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return {"features": features, "logits": self.head(features)}


def pairs() -> Task:
    generator = torch.Generator().manual_seed(0)
    ids, x = torch.randint(0, 700, (12, 6), generator=generator), torch.randn(12, 3, 8, 8, generator=generator)
    y = torch.randint(0, 4, (12,), generator=generator)
    data = [((ids[i : i + 4], x[i : i + 4]), y[i : i + 4]) for i in range(0, 12, 4)]
    return Task(example=(ids[:2], x[:2]), train=data, calibrate=data, test=data, quiet=True)


@pytest.mark.minutes
def test_a_model_of_several_inputs_is_shipped_and_scored(tmp_path: Path) -> None:
    model, task = Pair().eval(), pairs()
    run = compress(model, task, FOLD, out=tmp_path / "run")
    by_hand = torch.cat([model(*inputs)["logits"].argmax(1) == y for inputs, y in task.test]).double().mean()  # type: ignore[union-attr]
    for row in run.rows:
        assert row["scores"] == {"pytorch": pytest.approx(float(by_hand)), "onnxruntime": pytest.approx(float(by_hand))}
        assert row["latency_ms"]["onnxruntime"]["median"] > 0
    assert run.report["files"]["model.onnx"]["max_abs_error"] < 1e-5


def test_a_step_for_one_input_says_so() -> None:
    step = Recipe.parse("steps: [{resize: {sizes: [6]}}]").steps[0]
    with pytest.raises(SettingsError, match="takes 2 inputs, and resize serves models of one; leave it out"):
        step.run(Pair().eval(), pairs())
