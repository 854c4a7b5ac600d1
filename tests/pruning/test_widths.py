from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tersenet.errors import DataError, SettingsError
from tersenet.graph.costs import totals
from tersenet.models.cifar_resnet import CifarResNet
from tersenet.pruning.known import known_coupling
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.recipe import Recipe
from tersenet.step import Step
from tersenet.task import Task

NAMES = ["layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = CifarResNet((1, 1, 1)).train()
    with torch.no_grad():  # statistics as training leaves them
        for _ in range(20):
            model(torch.randn(16, 3, 8, 8))
    return model.eval()


def images(seed: int, count: int = 32) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def task(model: nn.Module | None = None) -> Task:
    return Task(example=images(0)[:2], calibrate=[images(i) for i in range(4)], original=model, quiet=True)


def widths_of(model: nn.Module) -> list[int]:
    return [model.get_submodule(name).out_channels for name in NAMES]  # type: ignore[misc]


def test_explicit_widths(model: nn.Module) -> None:
    cut, plan = PruneChannels(widths={"layer2.0.conv1": 12, "layer3.0.conv1": 64}).run(model, task())
    assert widths_of(cut) == [16, 12, 64]
    assert set(plan["kept"]) == {"layer2.0.conv1", "layer2.0.bn1", "layer2.0.conv2"}


@pytest.mark.parametrize(
    ("widths", "said"),
    [({"layer9.conv": 4}, r"'layer9.conv'.*layer1\.0\.conv1, layer2\.0\.conv1, layer3\.0\.conv1$"),
     ({"layer1.0.conv1": 17}, "17 channels of 'layer1.0.conv1'; possible: 1 to 16$")],
)  # fmt: skip
def test_impossible_widths(model: nn.Module, widths: dict[str, int], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        PruneChannels(widths=widths).plan(model, task())


def test_widths_where_nothing_can_be_cut(model: nn.Module) -> None:
    with pytest.raises(SettingsError, match=r"layer1\.0\.conv1"):
        PruneChannels(widths={"layer1.0.conv1": 4}, skip=("*",)).plan(model, task())


@pytest.mark.parametrize("value", [0, 2.0, True])
def test_widths_are_whole_numbers(value: object) -> None:
    with pytest.raises(SettingsError, match="whole numbers"):
        PruneChannels(widths={"a": value})  # type: ignore[dict-item]


def test_widths_in_a_recipe() -> None:
    recipe = Recipe((PruneChannels(widths={"layer1.0.conv1": 8, "layer2.0.conv1": 4}),))
    assert Recipe.parse(recipe.dump()) == recipe
    assert Recipe.parse("steps: [{prune_channels: {widths: {a.b: 3}}}]").steps[0].widths == {"a.b": 3}  # type: ignore[attr-defined]


def test_choices(model: nn.Module) -> None:
    assert PruneChannels().choices(model, task()) == {
        "layer1.0.conv1": [16, 12, 8, 4],
        "layer2.0.conv1": [32, 28, 24, 20, 16, 12, 8, 4],
        "layer3.0.conv1": [64, 56, 48, 40, 32, 24, 16, 8],
    }
    assert PruneChannels(multiple_of=16).choices(model, task()) == {
        "layer2.0.conv1": [32, 16], "layer3.0.conv1": [64, 48, 32, 16],
    }  # fmt: skip
    assert "conv1" in PruneChannels(residual=True).choices(model, task())


def test_what_was_chosen(model: nn.Module) -> None:
    step = PruneChannels(importance="l1").chosen({"layer1.0.conv1": 8})
    assert step == PruneChannels(importance="l1", widths={"layer1.0.conv1": 8})
    assert PruneChannels().chosen({}) is None


def test_what_is_coupled_is_read_again_after_a_cut(model: nn.Module) -> None:
    first = known_coupling(model, task().example)
    assert known_coupling(model, task().example) is first
    PruneChannels(refit=False).run(model, task())
    assert PruneChannels().choices(model, task())["layer3.0.conv1"][0] == 32


@pytest.mark.parametrize("importance", ["reconstruction", "l2"])
def test_sensitivities_are_those_of_a_real_cut(model: nn.Module, importance: str) -> None:
    """Against cutting, refitting the readers alone by the definition of least squares, and running the whole model."""
    step = PruneChannels(importance=importance)
    judges = images(9)
    before = copy.deepcopy(model.state_dict())
    found = step.sensitivities(model, task(), judges)
    assert {name: list(row) for name, row in found.items()} == step.choices(model, task())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for name, width in (("layer1.0.conv1", 8), ("layer3.0.conv1", 8)):
        picked = step.chosen({name: width})
        assert picked is not None
        plan = picked.plan(model, task())
        kept = plan["kept"][name]["out"]
        cut = picked.apply(copy.deepcopy(model), plan)
        refit(model, cut, name, kept)
        with torch.no_grad():
            p, q = torch.softmax(model(judges) / 4, 1), torch.softmax(cut(judges) / 4, 1)
        real = 16 * float((p * (p / q).log()).sum(dim=1).mean())
        assert found[name][width] == pytest.approx(real, rel=0.05)
        assert found[name][64 if "3" in name else 16] == 0.0


def refit(whole: nn.Module, cut: nn.Module, name: str, kept: list[int]) -> None:
    """The second convolution of a block on all positions of the calibration images, by torch's least squares."""
    block, thin = whole.get_submodule(name.rpartition(".")[0]), cut.get_submodule(name.rpartition(".")[0])
    inputs: list[Tensor] = []
    hook = block.conv2.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))  # type: ignore[union-attr]
    with torch.no_grad():
        whole(torch.cat([images(i) for i in range(4)]))
    hook.remove()
    read = nn.functional.unfold(inputs[0], 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    columns = torch.cat([torch.arange(9) + 9 * channel for channel in kept])
    target = read @ block.conv2.weight.detach().double().flatten(1).T  # type: ignore[union-attr, operator]
    solution = torch.linalg.lstsq(read[:, columns], target).solution.T
    with torch.no_grad():
        thin.conv2.weight.copy_(solution.view_as(thin.conv2.weight))  # type: ignore[union-attr, arg-type]


def test_a_budget_by_sensitivity(model: nn.Module) -> None:
    step = PruneChannels(macs=0.6, scope="sensitivity", importance="reconstruction")
    assert step.data_needed() == "inputs"
    total = totals(model, task().example).macs
    cut, plan = step.run(copy.deepcopy(model), task())
    assert 0.4 * total < totals(cut, task().example).macs <= 0.6 * total
    assert plan == step.plan(model, task())
    assert PruneChannels(macs=1.0, scope="sensitivity").plan(model, task()) == {}
    with pytest.raises(SettingsError, match="residual"):
        PruneChannels(macs=0.01, scope="sensitivity").plan(model, task())
    with pytest.raises(SettingsError, match="budget"):
        PruneChannels(scope="sensitivity")


def test_reconstruction_needs_data(model: nn.Module) -> None:
    with pytest.raises(DataError, match="calibration"):
        PruneChannels(importance="reconstruction").plan(model, Task(example=images(0)[:2]))


def test_reconstruction_knows_copies(model: nn.Module) -> None:
    """Every channel twice: half of them can go, one of each pair, whatever their size."""
    block = model.layer1[0]  # type: ignore[index, union-attr]
    with torch.no_grad():
        block.conv1.weight[8:] = block.conv1.weight[:8]
        for value in (block.bn1.weight, block.bn1.bias, block.bn1.running_mean, block.bn1.running_var):
            value[8:] = value[:8]
    plan = PruneChannels(importance="reconstruction", only=("layer1.0.conv1",)).plan(model, task())
    assert {place % 8 for place in plan["kept"]["layer1.0.conv1"]["out"]} == set(range(8))


class Mixed(nn.Module):
    """A bundle whose norm mixes its channels, and one that passes a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 1)
        self.deep, self.project = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        x = torch.relu(self.project(torch.relu(self.deep(x)))).mean((2, 3))
        return self.head(torch.relu(self.norm(self.hidden(x))))


def test_what_cannot_be_had_by_zeros_is_cut() -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    step: Step = PruneChannels(importance="reconstruction")
    found = step.sensitivities(model, task(), images(9))
    assert {name: list(row) for name, row in found.items()} == step.choices(model, task())
    assert found["hidden"][4] > found["hidden"][16] == 0.0
    assert found["b"][4] > 0.0
