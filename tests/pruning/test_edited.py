"""Plans of cut channels, edited by hand: what follows is found, and what cannot be is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersenet.errors import SurgeryError
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.task import Task


class Net(nn.Module):
    """A stem whose channels pass through an addition, a grouped convolution, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = x + self.conv2(torch.relu(self.bn1(self.conv1(x))))
        return self.head(torch.relu(self.grouped(x)).mean(dim=(2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def task() -> Task:
    return Task(example=torch.randn(2, 3, 8, 8), quiet=True)


def plan_for(model: nn.Module, **settings: Any) -> dict[str, Any]:
    plan = PruneChannels(sparsity=0.5, **settings).plan(model, task())
    return json.loads(json.dumps(plan))


def test_the_plan_lists_what_is_kept_once_per_bundle(model: nn.Module) -> None:
    plan = plan_for(model)
    assert set(plan["keep"]) == {"conv1", "grouped"}
    assert plan["keep"]["conv1"] == plan["kept"]["conv2"]["in"]
    assert PruneChannels().apply(model, plan).conv1.out_channels == 3


def test_an_edit_moves_everything_that_is_coupled(model: nn.Module) -> None:
    whole = copy.deepcopy(model)
    plan = plan_for(model)
    plan["keep"]["conv1"] = [0, 1, 2, 4, 5]
    cut = PruneChannels().apply(model, plan)
    assert torch.equal(cut.conv1.weight, whole.conv1.weight[[0, 1, 2, 4, 5]])
    assert torch.equal(cut.bn1.running_mean, whole.bn1.running_mean[[0, 1, 2, 4, 5]])
    assert torch.equal(cut.conv2.weight, whole.conv2.weight[:, [0, 1, 2, 4, 5]])
    assert cut(torch.randn(2, 3, 8, 8)).shape == (2, 4)


def test_a_list_can_be_taken_out_and_another_be_added(model: nn.Module) -> None:
    plan = plan_for(model)
    del plan["keep"]["grouped"]
    plan["keep"]["stem"] = [0, 1, 4, 5]  # not in the plan: it passes through an addition
    cut = PruneChannels().apply(model, plan)
    assert (cut.stem.out_channels, cut.conv2.out_channels, cut.grouped.in_channels) == (4, 4, 4)
    assert cut.grouped.out_channels == 8
    assert cut(torch.randn(2, 3, 8, 8)).shape == (2, 4)


def test_keep_lists_alone_are_a_plan_and_a_setting(model: nn.Module) -> None:
    written = {"keep": {"conv1": [1, 3]}, "input": "2x3x8x8"}
    a = PruneChannels().apply(copy.deepcopy(model), written)
    made, plan = PruneChannels(keep={"conv1": [1, 3]}, refit=False).run(copy.deepcopy(model), task())
    assert plan["keep"] == {"conv1": [1, 3]}
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ({"conv9": [0]}, r"no layer 'conv9'.*Possible: stem, conv1, grouped"),
        ({"": [0]}, r"layer '' \(Net\) makes no channels"),
        ({"conv1": [0, 6]}, r"'conv1' has channels 0 to 5.*keeps 6"),
        ({"conv1": [0, "1"]}, r"'conv1' has channels 0 to 5.*keeps '1'"),
        ({"conv1": []}, "keeps no channel of layer 'conv1'"),
        ({"conv1": [2, 1]}, "of layer 'conv1' must ascend"),
        ({"head": [0, 1]}, "channel 2 of layer 'head' cannot be cut: .*output"),
        ({"stem": [0, 1, 4, 5], "conv2": [0, 2, 4, 6]}, "1 of layer 'stem' stays and channel 1 of layer 'conv2' goes"),
        ({"grouped": [0, 1, 4]}, "channel 1 of layer 'grouped' stays and channel 5 of layer 'grouped' goes"),
    ],
)  # fmt: skip
def test_impossible_edits(model: nn.Module, keep: dict[str, Any], said: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SurgeryError, match=said):
        PruneChannels().apply(model, {**plan_for(model), "keep": keep})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(SurgeryError, match=said):
        PruneChannels(keep=keep).plan(model, task())


def test_an_edit_of_what_follows_is_checked(model: nn.Module) -> None:
    plan = plan_for(model)
    plan["kept"]["bn1"]["channel"] = [0, 1, 2]
    plan["kept"]["conv1"]["out"] = [3, 4, 5]
    with pytest.raises(SurgeryError, match="disagrees with 'keep' about layer"):
        PruneChannels().apply(model, plan)
    del plan["keep"]
    with pytest.raises(
        SurgeryError, match=r"channel 0 of layer 'conv1' goes and channel 0 of layer '(bn1|conv2)' stays"
    ):
        PruneChannels().apply(model, plan)


def test_plans_of_before_still_apply(model: nn.Module) -> None:
    kept = plan_for(model)["kept"]
    assert PruneChannels().apply(model, {"kept": kept}).conv1.out_channels == 3


@pytest.mark.parametrize(
    ("plan", "said"),
    [({"cut": 1}, "'keep' or 'kept'"), ({"keep": {"conv1": [0]}}, "'input' is None.*2x3x32x32"),
     ({"keep": {"conv1": [0]}, "input": "big"}, "'input' is 'big'")],
)  # fmt: skip
def test_plans_that_say_too_little(model: nn.Module, plan: dict[str, Any], said: str) -> None:
    with pytest.raises(SurgeryError, match=said):
        PruneChannels().apply(model, plan)


class Products(nn.Module):
    """A parameter that is cut along both of its dimensions, and one that is cut along its second one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.one, self.two = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(5, 6))
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.first(x) @ self.one, x @ self.two], 1))


def test_a_parameter_is_named_with_the_dimension_that_is_cut() -> None:
    torch.manual_seed(0)
    model, x = Products(), torch.randn(4, 5)
    task = Task(example=x, calibrate=[x], quiet=True)
    step = PruneChannels(sparsity=0.5, refit=False)
    plan = step.plan(model, task)
    assert set(plan["keep"]) == {"first", "one:dim1", "two:dim1"}
    cut = step.apply(copy.deepcopy(model), plan)
    assert (cut.one.shape, cut.two.shape) == ((4, 3), (5, 3))
    plan["keep"]["two:dim1"] = [0, 5]
    del plan["kept"]
    assert torch.equal(step.apply(copy.deepcopy(model), plan).two, model.two[:, [0, 5]])
