"""Curves go where the setting says, and a missing package is named with the command that installs it."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tersenet.errors import MissingExtra
from tersenet.task import Task
from tersenet.train import Train

DATA = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1])) for _ in range(60)]


def fit(logger: str, folder: Path | None) -> None:
    task = Task(example=DATA[0][0], train=DATA, folder=folder, quiet=True)
    Train(epochs=2, logger=logger, accelerator="cpu").fit(nn.Linear(3, 2), task)  # type: ignore[arg-type]


def test_csv_is_the_default_and_each_start_gets_a_file(tmp_path: Path) -> None:
    assert Train().logger == "csv"
    fit("csv", tmp_path)
    fit("csv", tmp_path)
    files = sorted(tmp_path.glob("logs/version_*/metrics.csv"))
    assert [path.parent.name for path in files] == ["version_0", "version_1"]
    with files[0].open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [49, 59, 99, 119], "every 50 batches, and at the end of each epoch"
    assert all(0 <= float(row["accuracy"]) <= 1 and float(row["loss"]) > 0 for row in rows)
    assert float(rows[0]["learning_rate"]) > float(rows[3]["learning_rate"]) > 0


def test_none_writes_no_log(tmp_path: Path) -> None:
    fit("none", tmp_path)
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("logger", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_named(logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, logger, None)
    with pytest.raises(MissingExtra, match=rf"{logger} is needed .* pip install {logger}"):
        fit(logger, tmp_path)


def test_mlflow_and_wandb_get_the_metrics_and_their_runs_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    mlflow: Any = SimpleNamespace(run=None)
    mlflow.active_run = lambda: mlflow.run
    mlflow.start_run = lambda: setattr(mlflow, "run", SimpleNamespace(info=SimpleNamespace(run_id="a")))
    mlflow.log_metrics = lambda metrics, step: said.append(("mlflow", sorted(metrics), step))
    mlflow.end_run = said.append
    wandb: Any = SimpleNamespace(run=None)
    run = SimpleNamespace(id="b", log=lambda metrics, step: said.append(("wandb", sorted(metrics), step)))
    wandb.init = lambda project, dir: setattr(wandb, "run", run)
    wandb.finish = lambda exit_code: said.append(exit_code)
    keys = ["accuracy", "learning_rate", "loss", "samples_per_s"]
    for name, module, end in (("mlflow", mlflow, "FINISHED"), ("wandb", wandb, 0)):
        monkeypatch.setitem(sys.modules, name, module)
        said.clear()
        fit(name, None)
        assert said == [*((name, keys, step) for step in (49, 59, 99, 119)), end]
