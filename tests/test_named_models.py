"""What a recipe names beside the model that it is for: teachers, opened by file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tersenet.deploy.artifact import load_terse, save_terse
from tersenet.errors import FileError, ModelError
from tersenet.job import compress
from tersenet.recipe import Recipe
from tersenet.search.search import Search
from tersenet.sources import open_model, open_task
from tersenet.task import batch_input
from tersenet.train import Train


def test_a_recipe_names_the_files_of_its_teachers(digits_weights: Path, tmp_path: Path) -> None:
    model, preparation = open_model("digits", digits_weights)
    task = open_task(model, preparation, "digits", batch_size=64, quiet=True)
    for name in "ab":
        save_terse(model, task.example, tmp_path / f"{name}.terse", preparation)
    recipe = Recipe.parse(
        f"steps: [train: {{epochs: 1, label_weight: 0, with: [soft_targets: {{teachers: [{tmp_path / 'a.terse'},"
        f" {tmp_path / 'b.terse'}]}}]}}]"
    )
    assert Recipe.parse(recipe.dump()) == recipe
    (train,) = recipe.steps
    assert isinstance(train, Train)
    batch = next(iter(task.train or []))
    loss = train.companions[0].loss(
        model.train(), task, batch, load_terse(tmp_path / "a.terse").eval()(batch_input(batch))
    )
    assert loss.item() == pytest.approx(0, abs=1e-4)  # both are what the student says
    fresh, _ = open_model("digits")
    train.run(fresh, dataclasses.replace(task, original=None))
    assert torch.isfinite(next(fresh.parameters())).all()


def test_what_cannot_teach_is_refused(digits_weights: Path, tmp_path: Path) -> None:
    model, preparation = open_model("digits", digits_weights)
    task = open_task(model, preparation, "digits", quiet=True)
    assert task.open_model is not None
    with pytest.raises(FileError, match=r"none\.terse"):
        task.open_model(str(tmp_path / "none.terse"))
    with pytest.raises(ModelError, match="without weights, which cannot teach"):
        task.open_model("digits")
    save_terse(model, task.example, tmp_path / "other.terse", dataclasses.replace(preparation, mean=(0.1,)))
    with pytest.raises(
        ModelError, match=r"other\.terse takes inputs of mean \(0\.1,\), the model that is trained takes"
    ):
        task.open_model(str(tmp_path / "other.terse"))


@pytest.mark.parametrize(
    "before",
    ["prune_weights: {sparsity: 0.5}", "search: {macs: 0.5x, steps: [prune_channels: {}]}"],
    ids=["step", "search"],
)
@pytest.mark.parametrize(
    "around", ["{train}", "repeat: {{steps: [{train}], until_drop: null, at_most: 1}}"], ids=["plain", "repeated"]
)
def test_a_teacher_that_is_not_there_is_missed_before_anything_runs(
    before: str, around: str, digits_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def solve(*_: object) -> None:
        raise AssertionError("it searches")

    monkeypatch.setattr(Search, "solve", solve)
    model, preparation = open_model("digits", digits_weights)
    task = open_task(model, preparation, "digits", quiet=True)
    train = f"train: {{epochs: 1, with: [soft_targets: {{teachers: [{tmp_path / 'none.terse'}]}}]}}"
    recipe = Recipe.parse(f"steps: [{before}, {around.format(train=train)}]")
    with pytest.raises(FileError, match=r"none\.terse"):
        compress(model, task, recipe, out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("01-*"))
