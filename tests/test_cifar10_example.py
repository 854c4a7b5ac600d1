"""The example of a CIFAR-10 network: its scores by hand, its cut in full, its steps as a recipe. On random data."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersenet.recipe import Recipe
from tersenet.task import Task

PATH = Path(__file__).parents[1] / "examples" / "cifar10_cnn.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cifar10_cnn", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(example: ModuleType) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return example.SmallCNN().eval()


@pytest.fixture(scope="module")
def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4)) for _ in range(2)]
    return Task(example=data[0][0][:2], train=data, calibrate=data, quiet=True)


def test_the_scores_are_those_of_the_text(example: ModuleType, model: nn.Module, task: Task) -> None:
    found = example.scores(model, task)
    assert list(found) == ["weights", "activations", "gradients", "all three", "random"]
    neuron = 5
    weights = [float(row.detach().abs().mean()) for row in model.fc1.weight]  # type: ignore[union-attr]
    assert float(found["weights"]["fc1"][neuron]) == pytest.approx(
        weights[neuron] * len(weights) / sum(weights), rel=1e-4
    )
    x = torch.cat([batch[0] for batch in task.calibrate or ()])
    with torch.no_grad():
        sizes = F.relu(model.conv1(x)).mean((0, 2, 3))  # type: ignore[operator]
    assert torch.allclose(found["activations"]["conv1"], sizes / sizes.mean(), rtol=1e-4)
    grads = []
    for batch in task.calibrate or ():
        model.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        grads.append(model.conv2.weight.grad.abs().mean((1, 2, 3)))  # type: ignore[union-attr]
    model.zero_grad()
    expected = (grads[0] + grads[1]) / (grads[0] + grads[1]).mean()
    assert torch.allclose(found["gradients"]["conv2"], expected, rtol=1e-3)
    parts = sum(found[kind]["fc1"] for kind in ("weights", "activations", "gradients"))
    assert torch.allclose(found["all three"]["fc1"], parts)


def test_the_cut_takes_connections_too_and_survives_yaml(example: ModuleType, model: nn.Module, task: Task) -> None:
    keep = example.kept(example.scores(model, task)["all three"])
    assert [len(keep[name]) for name in example.HIDDEN] == [7, 13, 103]
    step = dataclasses.replace(example.removal(keep), refit=False)
    assert Recipe.parse(Recipe((step,)).dump()).steps == (step,)
    plan = step.plan(model, task)
    smaller = step.apply(example.SmallCNN(), plan)
    shapes = [tuple(getattr(smaller, name).weight.shape) for name in (*example.HIDDEN, "fc2")]
    assert shapes == [(7, 3, 3, 3), (13, 7, 3, 3), (103, 13 * 8 * 8), (10, 103)]
    # What is left computes what the whole network does when the outputs of all other neurons are zero.
    zeroed = example.SmallCNN()
    zeroed.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, kept in keep.items():
            gone = torch.ones(getattr(zeroed, name).weight.shape[0], dtype=torch.bool)
            gone[kept] = False
            getattr(zeroed, name).weight[gone] = 0.0
            getattr(zeroed, name).bias[gone] = 0.0
        cut = example.SmallCNN()
        cut.load_state_dict(model.state_dict())
        cut = step.apply(cut, plan)
        assert torch.allclose(cut(task.example), zeroed(task.example), atol=1e-5)
