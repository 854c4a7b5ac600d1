"""Blocks are dropped by name or by importance; what is left is repaired, exports, and can be cut further."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.runtimes import open_file
from tersenet.errors import NoEffect, SettingsError
from tersenet.graph.blocks import residual_blocks
from tersenet.graph.costs import totals
from tersenet.models import build
from tersenet.pruning.drop_blocks import DropBlocks, importance
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.sources import open_model, open_task
from tersenet.task import Task, score_model

SHARED = Path(__file__).parents[3] / "shared" / "data"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn(self.conv(x)))


class Net(nn.Module):
    """A stem, four blocks of which the second of two changes the shape, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(), Block(), nn.Sequential(nn.MaxPool2d(2)), Block(), Block())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.bn(self.stem(x)))).mean(dim=(2, 3)))


ALL = ("blocks.0", "blocks.1", "blocks.3", "blocks.4")


@pytest.fixture
def model() -> nn.Module:
    """Norms that fit the data, as after training, and blocks that matter in the order 1, 4, 0, 3."""
    torch.manual_seed(0)
    net = Net()
    for path, size in zip(("blocks.1", "blocks.4", "blocks.0", "blocks.3"), (0.1, 0.3, 0.6, 1.5), strict=True):
        nn.init.constant_(net.get_submodule(path).bn.weight, size)
    net.train()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # the plain mean
    for x, _ in task().calibrate:  # type: ignore[union-attr]
        net(x)
    return net.eval()


def task(model: nn.Module | None = None, data: bool = True) -> Task:
    batches = [
        (torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(i)), torch.zeros(64)) for i in range(4)
    ]
    return Task(example=batches[0][0][:2], calibrate=batches if data else None, original=model, quiet=True)


def images(count: int = 256) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(9))


# --- plan and apply -----------------------------------------------------------------------------------------------


def test_named_blocks_go(model: nn.Module) -> None:
    step = DropBlocks(blocks=("blocks.3", "blocks.1"), refit=False)
    less, plan = step.run(copy.deepcopy(model), task())
    assert plan == {"dropped": ["blocks.1", "blocks.3"], "activations": {}}
    assert [type(block).__name__ for block in less.blocks] == ["Block", "Identity", "Sequential", "Identity", "Block"]
    x = images(8)
    y = model.blocks[4](model.blocks[2](model.blocks[0](F.relu(model.bn(model.stem(x))))))
    assert torch.equal(less(x), model.head(y.mean(dim=(2, 3))))
    assert totals(less, x).macs < totals(model, x).macs


@pytest.mark.parametrize("data", [True, False])
def test_the_least_important_go_first(model: nn.Module, data: bool) -> None:
    order = ["blocks.1", "blocks.4", "blocks.0", "blocks.3"]
    for count in range(1, 5):
        plan = DropBlocks(count=count).plan(model, task(data=data))
        assert set(plan["dropped"]) == set(order[:count])


def test_importance_is_the_relative_size_of_what_is_added(model: nn.Module) -> None:
    inputs: dict[str, list[Tensor]] = {}
    for path in ALL:
        model.get_submodule(path).register_forward_hook(
            lambda m, x, y, path=path: inputs.setdefault(path, [x[0], y]) and None
        )
    with torch.no_grad():
        model(torch.cat([x for x, _ in task().calibrate]))  # type: ignore[union-attr]
    found = importance(model, residual_blocks(model, images(2)).found, task())
    for path, (x, y) in inputs.items():
        assert found[path] == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-4)


def test_a_block_that_adds_in_place_is_measured_too() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x += self.conv(x)
            return x

    net = nn.Sequential(nn.Conv2d(3, 3, 1), Adds()).eval()
    nn.init.dirac_(net[1].conv.weight)
    nn.init.zeros_(net[1].conv.bias)
    assert importance(net, {"1": None}, task())["1"] == pytest.approx(1.0), "it doubles its input"


def test_without_norms_weights_are_measured() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x)

    net = nn.Sequential(nn.Conv2d(3, 3, 1), Plain(), Plain())
    nn.init.constant_(net[1].conv.weight, 2.0)
    nn.init.constant_(net[2].conv.weight, -1.0)
    assert importance(net, {"1": None, "2": None}, task(data=False)) == {"1": pytest.approx(2), "2": pytest.approx(1)}


def test_only_and_skip(model: nn.Module) -> None:
    assert DropBlocks(count=1, skip=("blocks.1",)).plan(model, task())["dropped"] == ["blocks.4"]
    assert DropBlocks(count=1, only=("blocks.3",)).plan(model, task())["dropped"] == ["blocks.3"]
    assert DropBlocks(blocks=ALL, only=("Block",), skip=("*.0",)).plan(model, task())["dropped"] == list(ALL[1:])
    with pytest.warns(NoEffect):
        DropBlocks(count=2, skip=("Block",)).run(model, task())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": ("blocks.2",)}, "'blocks.2' cannot be dropped: it changes the shape .*: blocks.0, blocks.1"),
        ({"blocks": ("stem",)}, "'stem' cannot be dropped: it is a single layer"),
        ({"blocks": ("layer9",)}, "'layer9' cannot be dropped: there is no such module; blocks that can: blocks.0"),
        ({"count": 5}, "count is 5, but only 4 blocks can be dropped: blocks.0, blocks.1, blocks.3, blocks.4"),
        ({"count": -1}, "count must be at least 0, got -1"),
        ({"count": 1, "blocks": ("a",)}, "give one of the two"),
        ({"blocks": "blocks.0"}, r"write blocks: \[blocks.0\]"),
    ],
)
def test_what_cannot_be_is_refused(model: nn.Module, settings: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        DropBlocks(**settings).plan(model, task())


# --- repair -------------------------------------------------------------------------------------------------------


def norms(model: nn.Module) -> dict[str, Tensor]:
    return {path: m.running_var.clone() for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def test_repair_brings_the_outputs_back(model: nn.Module) -> None:
    x = images()
    error = {}
    for refit in (False, True):
        less, _ = DropBlocks(blocks=("blocks.0", "blocks.3"), refit=refit).run(copy.deepcopy(model), task())
        with torch.no_grad():
            error[refit] = float((less(x) - model(x)).norm() / model(x).norm())
    assert error[True] < 0.6 * error[False]


def test_a_changed_model_gets_new_norms_behind_the_lost_blocks_only(model: nn.Module) -> None:
    step = DropBlocks(blocks=("blocks.1",))
    less = step.apply(copy.deepcopy(model), step.plan(model, task()))
    less.blocks[3].conv.weight.data.mul_(2)
    before = norms(less)
    weights = {key: value.clone() for key, value in less.named_parameters()}
    step.fit(less, task(model))
    after = norms(less)
    assert {path for path in after if not torch.equal(after[path], before[path])} == {"blocks.3.bn", "blocks.4.bn"}
    assert all(torch.equal(value, weights[key]) for key, value in less.named_parameters())
    seen: list[Tensor] = []
    less.blocks[3].bn.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    with torch.no_grad():
        less(torch.cat([x for x, _ in task().calibrate]))  # type: ignore[union-attr]
    assert torch.allclose(after["blocks.3.bn"], seen[0].movedim(1, 0).flatten(1).var(dim=1), rtol=1e-4)


def test_fit_without_a_drop_or_data_changes_nothing(model: nn.Module) -> None:
    less = DropBlocks(blocks=("blocks.1",), refit=False).run(copy.deepcopy(model), task())[0]
    for net, given, step in (
        (model, task(model), DropBlocks(count=1)),
        (less, task(model), DropBlocks()),
        (less, task(model, data=False), DropBlocks(blocks=("blocks.1",))),
    ):
        state = copy.deepcopy(net.state_dict())
        step.fit(net, given)
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@pytest.mark.minutes
def test_resnet20_without_a_block_still_classifies() -> None:
    weights = SHARED / "weights" / "cifar10_resnet20.safetensors"
    if not weights.exists():
        pytest.skip("the shared weights and CIFAR-10 are not here")
    net, preparation = open_model("resnet20", weights)
    given = open_task(net, preparation, f"parquet:{SHARED / 'cifar10'}", quiet=True)
    assert given.test is not None
    some = [batch for batch, _ in zip(given.test, range(4), strict=False)]
    score = {}
    for refit in (False, True):
        less, _ = DropBlocks(count=1, refit=refit).run(copy.deepcopy(net), given)
        score[refit] = score_model(less, given, some).value
    assert score[True] > max(0.85, score[False])


# --- with others --------------------------------------------------------------------------------------------------


def test_choices_and_chosen(model: nn.Module) -> None:
    step = DropBlocks(count=3, skip=("blocks.0",))
    choices = step.choices(model, task())
    assert choices == {path: ["keep", "drop"] for path in ALL[1:]}
    picked = dict.fromkeys(choices, "keep")
    assert step.chosen(picked) is None
    chosen = step.chosen({**picked, "blocks.4": "drop"})
    assert chosen == dataclasses.replace(step, blocks=("blocks.4",), count=0)
    assert chosen.plan(model, task())["dropped"] == ["blocks.4"]
    with pytest.raises(SettingsError, match="allowed: keep, drop"):
        step.chosen({"blocks.4": "halve"})


def test_channels_can_be_cut_afterwards_and_the_file_agrees(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = build("resnet20").eval()
    x = torch.randn(2, 3, 32, 32)
    given = Task(example=x, quiet=True)
    less, first = DropBlocks(blocks=("layer1.1", "layer3.2")).run(copy.deepcopy(net), given)
    less, second = PruneChannels(sparsity=0.5).run(less, given)
    fresh = build("resnet20").eval()
    for step, plan in ((DropBlocks(), first), (PruneChannels(), second)):
        fresh = step.apply(fresh, json.loads(json.dumps(plan)))
    fresh.load_state_dict(less.state_dict())
    assert torch.equal(fresh(x), less(x))
    assert not any(key.startswith(("layer1.1.", "layer3.2.")) for key in less.state_dict())
    got = open_file(export_onnx(less, x, tmp_path / "less.onnx")).run(x.numpy())
    assert torch.allclose(torch.from_numpy(got), less(x), atol=1e-4)
