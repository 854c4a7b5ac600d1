"""The penalty on activations: its value, what it looks at, and that training with it makes zeros."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tersenet.errors import SettingsError
from tersenet.pruning.activation_penalty import ActivationPenalty, hoyer
from tersenet.pruning.activation_zeros import activation_zeros
from tersenet.task import Task
from tersenet.train import Train


def network() -> tuple[nn.Module, Task]:
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
        x = torch.randn(64, 8)
    task = Task(example=x[:2], train=[(x, x[:, :3].argmax(dim=1))] * 20, calibrate=[x], quiet=True)
    return model, task


def test_hoyer_counts_what_matters() -> None:
    x = torch.zeros(2, 10)
    x[:, :4] = 3.0
    assert float(hoyer(x)) == pytest.approx(0.4)
    assert float(hoyer(7 * x)) == pytest.approx(0.4)
    assert float(hoyer(torch.zeros(2, 10))) == 0.0


@pytest.mark.parametrize("kind", ["hoyer", "l1"])
def test_the_loss_is_the_mean_over_what_layers_read(kind: str) -> None:
    model, task = network()
    companion = ActivationPenalty(kind=kind, weight=0.5)
    x = task.example
    companion.tick(model, 0.0)
    found = companion.loss(model, task, (x,), model(x)).detach()  # type: ignore[union-attr]
    read = [torch.relu(model[0](x)).detach()]
    read.append(torch.relu(model[2](read[0])).detach())
    wanted = [float(hoyer(part)) if kind == "hoyer" else float(part.abs().mean()) for part in read]
    assert float(found) == pytest.approx(0.5 * sum(wanted) / 2)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert companion.loss(model, task, (x,), model(x)) == 0.0


def test_only_and_skip_choose_the_layers() -> None:
    model, task = network()
    companion = ActivationPenalty(only=("4",), weight=1.0)
    companion.tick(model, 0.0)
    found = companion.loss(model, task, None, model(task.example)).detach()  # type: ignore[union-attr]
    read = torch.relu(model[2](torch.relu(model[0](task.example)))).detach()
    assert float(found) == pytest.approx(float(hoyer(read)))


@pytest.mark.parametrize("kind", ["hoyer", "l1"])
def test_training_with_it_makes_zeros(kind: str) -> None:
    model, task = network()

    def zeros(weight: float) -> float:
        twin = copy.deepcopy(model)
        penalty = ActivationPenalty(kind=kind, weight=weight)
        Train(epochs=5, learning_rate=0.05, companions=(penalty,), logger="none").run(twin, task)
        return sum(row.zeros for row in activation_zeros(twin, task)) / 3

    assert zeros(1.0) > zeros(0.0) + 0.1


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(SettingsError, match="kind must be one of hoyer, l1"):
        ActivationPenalty(kind="l2")
    with pytest.raises(SettingsError, match="weight must be at least 0"):
        ActivationPenalty(weight=-1.0)
    with pytest.raises(SettingsError, match="only must be a list"):
        ActivationPenalty(only="conv")  # type: ignore[arg-type]
