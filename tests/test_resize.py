"""Inputs of another size: as a step, as choices of a search, and in the files that ship."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from residual_net import residual_net, residual_task
from tersenet.data.batches import TensorBatches
from tersenet.deploy.runtimes import open_file
from tersenet.dry_run import dry_run
from tersenet.errors import SettingsError
from tersenet.graph.costs import totals
from tersenet.job import compress
from tersenet.numerics.divergence import divergence
from tersenet.numerics.resizing import resized
from tersenet.pruning.drop_blocks import DropBlocks
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.recipe import Recipe
from tersenet.resize import Resize, Resized, at_size, size_in
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.search.search import Search
from tersenet.step import Chain
from tersenet.targets import Target, recipe_of
from tersenet.task import Preparation, Task


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERSENET_CACHE", str(tmp_path / "cache"))


def labelled(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(count, 3, 8, 8, generator=generator), torch.randint(6, (count,), generator=generator))]


class Flat(nn.Module):
    """A network that knows how big its input is: the features are laid flat."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.conv(x)).flatten(1))


def test_images_of_another_size() -> None:
    images = torch.randn(2, 3, 8, 8)
    assert resized(images, (8, 8)) is images
    # Halved, every pixel is a mean of its neighbourhood: a constant stays, and prepared images may be resized.
    mean, std = torch.randn(1, 3, 1, 1), torch.rand(1, 3, 1, 1) + 0.5
    torch.testing.assert_close(resized(torch.full((1, 1, 8, 8), 3.0), (4, 4)), torch.full((1, 1, 4, 4), 3.0))
    torch.testing.assert_close(resized((images - mean) / std, (4, 6)), (resized(images, (4, 6)) - mean) / std)
    # Without the wide filter, one pixel in two would be left out; with it a checkerboard becomes grey.
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2.0
    assert (resized(board[None, None].float(), (4, 4)) - 0.5).abs().max() < 0.05


@pytest.mark.parametrize(("text", "size"), [("192", (192, 192)), ("180x240", (180, 240)), (" 8X6 ", (8, 6))])
def test_sizes(text: str, size: tuple[int, int]) -> None:
    assert size_in(text) == size


@pytest.mark.parametrize("text", ["", "0", "-3", "12x", "x12", "1.5", "big", "8x8x8", "0x8", "8x0"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(SettingsError, match="is no size of inputs; give one such as 192, or height x width such as"):
        Resize(sizes=(text,))


def test_the_task_of_what_follows() -> None:
    model = residual_net()
    task = residual_task(model)
    task = dataclasses.replace(task, train=labelled(), calibrate=labelled(), validate=labelled(), test=labelled())
    step = Resize(sizes=(4,))
    plan = step.plan(model, task)
    assert plan == {"size": [4, 4]}
    after = step.task_after(task, json.loads(json.dumps(plan)))
    assert after.preparation == dataclasses.replace(task.preparation, size=(4, 4))
    assert after.example.shape[2:] == (4, 4)
    for data in (after.train, after.calibrate, after.validate, after.test):
        assert data is not None
        for x, y in data:
            assert x.shape[2:] == (4, 4)
            assert y.dtype == torch.int64
    assert task.example.shape[2:] == (8, 8)  # the task itself is as it was
    assert step.task_after(task, {}) is task
    assert Resize(sizes=("8",)).plan(model, task) == {}  # the size that it has
    # A chain hands the new task on to its next steps, and says so itself.
    seen: list[Any] = []

    class Look(FoldBatchNorm):
        def fit(self, model: nn.Module, task: Task) -> None:
            seen.append(tuple(task.example.shape[2:]))

    chain = Chain(steps=(step, Look()))
    _, plan = chain.run(copy.deepcopy(model), task)
    assert seen == [(4, 4)]
    assert chain.task_after(task, plan).preparation.size == (4, 4)


def test_batches_can_still_start_anywhere() -> None:
    images = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    own = TensorBatches(images, torch.arange(10), 3, Preparation((8, 8)), shuffle=True)
    data = Resized(own, (4, 6))
    assert len(data) == 4
    for (x, y), (a, b) in zip(data.at(2, 1), own.at(2, 1), strict=True):
        assert torch.equal(x, resized(a, (4, 6)))
        assert torch.equal(y, b)
    pair = next(iter(Resized([{"image": torch.zeros(1, 3, 8, 8), "label": torch.zeros(1, dtype=torch.int64)}], (4, 4))))
    assert pair["image"].shape == (1, 3, 4, 4)


def test_what_is_scored_is_read_anew_where_it_can_be() -> None:
    model = residual_net()
    asked: list[Preparation] = []

    def reopen(preparation: Preparation) -> Task:
        asked.append(preparation)
        return dataclasses.replace(residual_task(model), test=[(torch.full((2, 3, *preparation.size), 7.0), None)])

    task = dataclasses.replace(residual_task(model), train=labelled(), test=labelled(), reopen=reopen)
    after = at_size(task, (4, 4))
    assert asked == []  # not before somebody looks
    assert after.train is not None
    assert next(iter(after.train))[0].shape[2:] == (4, 4)
    assert asked == []
    assert after.test is not None
    (x, _), *_ = after.test
    assert torch.equal(x, torch.full((2, 3, 4, 4), 7.0))
    assert [each.size for each in asked] == [(4, 4)]
    assert len(after.test) == 1  # type: ignore[arg-type]
    assert len(asked) == 1


def test_networks_that_know_their_size_are_refused() -> None:
    model = Flat()
    task = Task(example=torch.randn(2, 3, 8, 8))
    with pytest.raises(SettingsError) as refused:
        Resize(sizes=(4,)).plan(model, task)
    said = str(refused.value)
    assert said.startswith("the network cannot take inputs of 4x4 instead of 8x8: its size is fixed in the graph (mat1")
    assert "\n" not in said
    with pytest.raises(SettingsError, match="its size is fixed in the graph"):
        Search(steps=(Resize(sizes=(4,)), PruneChannels()), macs="0.5x", images=0).solve(
            nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1), model), task
        )
    with pytest.raises(SettingsError, match="its outputs would have another shape"):
        Resize(sizes=(4,)).plan(nn.Conv2d(3, 2, 1), task)
    with pytest.raises(SettingsError, match="have no size that could be changed"):
        Resize(sizes=(4,)).plan(nn.Linear(3, 2), Task(example=torch.randn(2, 3)))


def test_several_sizes_are_for_a_search() -> None:
    with pytest.raises(SettingsError, match="sizes are 6, 4; several are choices of a search"):
        Resize(sizes=(6, 4)).plan(residual_net(), residual_task(residual_net()))
    with pytest.raises(SettingsError, match="sizes is empty"):
        Resize(sizes=())


def test_resolutions_are_typed() -> None:
    recipe = recipe_of(target=Target(latency="0.5x"), resolutions=("192", "160"), epochs=0)
    search = recipe.steps[0]
    assert isinstance(search, Search)
    assert search.steps[0] == Resize(sizes=("192", "160"))
    assert Recipe.parse(recipe.dump()) == recipe
    assert isinstance(recipe_of(target=Target(macs="0.5x"), resolutions=("192",)).steps[0], Search)
    with pytest.raises(SettingsError, match="in a recipe, write a resize step into its search"):
        recipe_of("recipe.yaml", resolutions=("192",))


@pytest.mark.minutes
def test_a_search_chooses_the_size() -> None:
    """Of 8x8, 6x6 and 4x4 the one whose answer is nearest to the original on images of 8x8; at 4x4 a quarter of
    the multiply-adds is left with nothing cut."""
    pytest.importorskip("scipy")
    model = residual_net()
    task = residual_task(model)
    steps = (Resize(sizes=(6, 4)), DropBlocks(), PruneChannels())
    search = Search(steps=steps, macs="0.5x", images=32)
    found = search.solve(model, task)
    assert found.met
    inputs = {each.get("inputs", "8x8") for each in found.said["proposals"]}
    assert inputs == {"8x8", "6x6", "4x4"}
    whole = totals(model, task.example).macs
    assert found.said["original"] == whole  # of the original with inputs of its own size
    fits = [each for each in found.said["proposals"] if each["measured"] <= whole / 2]
    best = min(fits, key=lambda each: each["divergence"])
    assert found.said["picked"] == best
    # What is said of the one that was picked is what its steps make.
    made, plan = search.run(copy.deepcopy(model), task)
    after = search.task_after(task, json.loads(json.dumps(plan)))
    assert "x".join(map(str, after.example.shape[2:])) == best.get("inputs", "8x8")
    assert totals(made, after.example).macs == best["measured"]
    # Where only 4x4 is left, its loss counts against the original on images of the original's size.
    images = torch.cat(list(task.calibration(64)))[:64]  # type: ignore[arg-type]
    with torch.no_grad():
        least = divergence(model(images[32:]), model(resized(images[32:], (4, 4))))
    small = [each["divergence"] for each in found.said["proposals"] if each.get("inputs") == "4x4"]
    assert min(small) >= 0.5 * least > 0


@pytest.mark.minutes
def test_the_file_that_ships_says_its_size(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = residual_net()
    task = dataclasses.replace(residual_task(model), test=labelled(32))
    run = compress(model, task, (Resize(sizes=(4,)), FoldBatchNorm()), out=tmp_path / "run")
    said = Preparation.of_metadata(open_file(run.file("model.onnx")).metadata)
    assert said is not None
    assert said.size == (4, 4)
    assert run.report["preparation"]["inputs"][0]["shape"][1:] == [4, 4]
    rows = run.rows
    assert rows[1]["macs"] < 0.4 * rows[0]["macs"]
    assert rows[1]["score"] == pytest.approx(rows[1]["scores"]["pytorch"])
    assert Recipe.read(run.folder / "recipe.yaml").steps[0] == Resize(sizes=("4",))
    # Called again, it goes on with the task that the finished steps leave.
    (tmp_path / "run" / "report.json").unlink()
    next((tmp_path / "run").glob("02-*.json")).unlink()
    again = compress(model, task, (Resize(sizes=(4,)), FoldBatchNorm()), out=tmp_path / "run")
    assert again.report["preparation"]["inputs"][0]["shape"][1:] == [4, 4]
    assert [row["macs"] for row in again.rows] == [row["macs"] for row in rows]
    planned = dry_run(model, task, Recipe((Resize(sizes=(4,)),)))
    assert planned["rows"][1]["macs"] < 0.4 * planned["rows"][0]["macs"]
