"""Grids that are kept: where they are found, how numbers on them learn, and what a training leaves of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cases import task_for, tiny
from tersenet.bricks.grid import Grid, grids, put_under
from tersenet.bricks.mask import masked_layers
from tersenet.codec.values import grid_of
from tersenet.errors import NoEffect
from tersenet.pruning.prune_weights import PruneWeights
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.rewrite.settle import Settle
from tersenet.size.keep_grids import KeepGrids
from tersenet.size.shrink_file import ShrinkFile, coded_bytes
from tersenet.step import Chain
from tersenet.train import Train

SHRUNK = (FoldBatchNorm(), ShrinkFile(price=1e-8))
TRAINED = (KeepGrids(), Train(epochs=4, optimizer="adam", learning_rate=0.2, weight_decay=0), Settle())


def shrunk() -> nn.Module:
    model = tiny()
    return Chain(steps=SHRUNK).run(model, task_for(model))[0]


def test_a_training_moves_numbers_from_one_of_the_grid_to_another() -> None:
    before = shrunk()
    made = Chain(steps=TRAINED).run(copy.deepcopy(before), task_for(before))[0]
    moved = 0
    for path, was in before.named_parameters():
        if path == "linear.bias":  # six numbers, whose step nothing tells
            continue
        now = made.get_parameter(path)
        rows = [(was, now)] if was.dim() == 1 else list(zip(was, now, strict=True))
        for old, new in rows:
            found = grid_of(old.detach().flatten().numpy() + 0.0)
            assert found is not None
            steps = new.detach() / float(found[0])
            assert torch.equal(steps, steps.round()), path
            moved += int((old != new).sum())
        if was.dim() > 1:
            assert not bool((now[was == 0] != 0).any())
    assert moved > 10
    assert coded_bytes(made) < 1.1 * coded_bytes(before)


def test_nothing_changes_before_a_training() -> None:
    before = shrunk()
    task = task_for(before)
    made, plan = KeepGrids().run(copy.deepcopy(before), task)
    assert plan["grids"]["conv1"] == {"weight": True, "bias": False}
    assert torch.equal(made(task.example), before(task.example))
    settled = Settle().run(made, task)[0]
    assert not list(grids(settled))
    assert all(torch.equal(value, before.get_parameter(path)) for path, value in settled.named_parameters())


def test_the_gradient_goes_through_in_units_of_steps() -> None:
    layer = nn.Linear(3, 2, bias=False)
    grid = put_under(layer, "weight", rows=True)
    grid.step.copy_(torch.tensor([[0.5], [2.0]]))
    grid.kept[0, 1] = False
    with torch.no_grad():
        layer.weight = torch.tensor([[1.0, 7.0, -0.7], [2.0, 0.0, 4000.0]])
    assert layer.weight.tolist() == [[1.0, 0.0, -0.5], [2.0, 0.0, 510.0]]  # 255 steps at most
    pull = torch.arange(1.0, 7.0).view(2, 3)
    (layer.weight * pull).sum().backward()
    stored = layer.parametrizations["weight"].original  # type: ignore[index,union-attr]
    assert stored.grad.tolist() == [[0.5, 0.0, 1.5], [8.0, 10.0, 0.0]]


def test_a_row_without_a_step_is_left_as_it_is() -> None:
    grid = Grid((2, 2))
    value = torch.tensor([[0.3, -0.2], [0.1, 5.0]], requires_grad=True)
    assert torch.equal(grid(value), value)
    grid(value).sum().backward()
    assert value.grad is not None
    assert torch.equal(value.grad, torch.ones(2, 2))


def test_masks_become_zeros_that_are_held() -> None:
    model = tiny()
    task = task_for(model)
    made = Chain(steps=(PruneWeights(sparsity=0.6), *SHRUNK, KeepGrids())).run(model, task)[0]
    assert not list(masked_layers(made))
    held = {path: grid for path, _, name, grid in grids(made) if name == "weight"}
    assert held["conv2"].kept.double().mean() < 0.45


def test_what_is_on_no_grid_trains_as_it_is() -> None:
    model = tiny()
    with pytest.warns(NoEffect, match="keep_grids"):
        assert KeepGrids().run(model, task_for(model))[1] == {}
    half = shrunk()
    with torch.no_grad():
        half.conv1.weight[0].normal_()
    assert "weight" not in KeepGrids().plan(half, task_for(half))["grids"]["conv1"]
