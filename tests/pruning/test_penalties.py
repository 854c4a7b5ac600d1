"""Penalties against closed forms: the loss written out, soft thresholding where training ends, and what a cut loses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersenet.bricks.mask import attach
from tersenet.errors import ModelError, SettingsError
from tersenet.pruning.penalties import GroupLasso, ScalePenalty
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.recipe import Recipe
from tersenet.step import Companion
from tersenet.task import Task
from tersenet.train import Train

KNOWN: Any = {"scale_penalty": ScalePenalty, "group_lasso": GroupLasso}


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 6, (1, 3), groups=2), nn.BatchNorm2d(6),
            nn.BatchNorm2d(6, affine=False), nn.ConvTranspose2d(6, 5, 2), nn.Flatten(), nn.Linear(8, 2),
        )  # fmt: skip
        for layer in model:
            if isinstance(layer, nn.BatchNorm2d) and layer.affine:
                nn.init.normal_(layer.weight)
    return model


def value(companion: Companion, model: nn.Module) -> float:
    loss = companion.loss(model, Task(example=torch.zeros(2, 1)), None, None)
    assert isinstance(loss, Tensor)
    return float(loss.detach())


def test_scales_written_out() -> None:
    model = net()
    scales = [abs(float(each)) for index in (1, 3) for each in model[index].weight.detach()]  # type: ignore[index]
    assert value(ScalePenalty(strength=0.1), model) == pytest.approx(0.1 * sum(scales), rel=1e-5)
    only = [abs(float(each)) for each in model[3].weight.detach()]  # type: ignore[index]
    assert value(ScalePenalty(strength=0.1, skip=("1",)), model) == pytest.approx(0.1 * sum(only), rel=1e-5)


def grouped(layer: Any, groups: str) -> float:
    """Group by group, weight by weight."""
    weight, blocks = layer.weight.detach(), getattr(layer, "groups", 1)
    if isinstance(layer, nn.ConvTranspose2d):
        weight = weight.transpose(0, 1)
    found: dict[Any, list[float]] = {}
    for out in range(weight.shape[0]):
        for read in range(weight.shape[1]):
            block = out // (weight.shape[0] // blocks)
            key = {"filters": out, "channels": (block, read), "kernels": (out, read)}[groups]
            found.setdefault(key, []).extend(weight[out, read].flatten().tolist())
    return sum(math.sqrt(len(part)) * math.sqrt(sum(each**2 for each in part)) for part in found.values())


@pytest.mark.parametrize("groups", ["filters", "channels", "kernels"])
def test_groups_written_out(groups: Any) -> None:
    model = net()
    expected = sum(grouped(model[i], groups) for i in (0, 2, 5, 7) if groups != "kernels" or i != 7)  # type: ignore[index]
    assert value(GroupLasso(strength=0.1, groups=groups), model) == pytest.approx(0.1 * expected, rel=1e-5)


def test_a_group_at_zero_stays_there_and_masked_weights_do_not_count() -> None:
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight[1] = 0.0
    attach(layer).mask[2] = False
    model = nn.Sequential(layer)
    loss = GroupLasso(strength=1.0).loss(model, Task(example=torch.zeros(2, 4)), None, None)
    assert float(loss.detach()) == pytest.approx(2 * float(layer.weight[0].detach().norm()), rel=1e-6)
    loss.backward()
    gradient = layer.parametrizations["weight"].original.grad  # type: ignore[union-attr,index]
    assert torch.equal(gradient[1:], torch.zeros(2, 4))
    assert torch.allclose(gradient[0], 2 * layer.weight[0] / layer.weight[0].norm())


def test_a_growing_strength_follows_the_training() -> None:
    model = net()
    growing, steady = ScalePenalty(strength=0.2, growing=True), ScalePenalty(strength=0.2)
    for progress in (0.0, 0.25, 0.9):
        growing.tick(model, progress)
        assert value(growing, model) == pytest.approx(progress * value(steady, model), rel=1e-6)


def test_scales_end_where_soft_thresholding_says() -> None:
    """y = gamma * z with z of mean square 1 and the loss 1/2 mean over samples of sum_c (y_c - a_c z_c)^2:
    gamma = sign(a) max(|a| - strength, 0)."""
    wanted = torch.tensor([1.0, -0.8, 0.3, 0.05, -0.02])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 5, generator=generator, dtype=torch.float64)
    x = ((x - x.mean(0)) / x.std(0, unbiased=False)).float()
    model = nn.Sequential(nn.BatchNorm1d(5, eps=1e-12))
    task = Task(
        example=x[:2], train=[(x, wanted * x)], quiet=True,
        loss=lambda outputs, batch: 0.5 * (outputs - batch[1]).square().sum(1).mean(),
    )  # fmt: skip
    penalty = ScalePenalty(strength=0.1)
    Train(epochs=300, learning_rate=0.1, weight_decay=0.0, momentum=0.0, logger="none", companions=(penalty,)).run(
        model, task
    )
    expected = wanted.sign() * (wanted.abs() - 0.1).clamp(min=0)
    assert torch.allclose(model[0].weight.detach(), expected, atol=2e-3)


@pytest.mark.parametrize("groups", ["filters", "channels"])
def test_groups_end_where_block_soft_thresholding_says(groups: Any) -> None:
    """With the loss 1/2 ||W - A||^2 a group ends at A_g max(1 - strength sqrt(|g|) / ||A_g||, 0)."""
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(6, 4, generator=generator) * torch.tensor([1.0, 0.05, 1.0, 0.1, 1.0, 0.02])[:, None]
    if groups == "channels":
        wanted = wanted.T.contiguous()
    model = nn.Sequential(nn.Linear(wanted.shape[1], wanted.shape[0], bias=False))
    eye = torch.eye(wanted.shape[1])
    task = Task(
        example=eye[:2], train=[(eye, wanted.T.contiguous())], quiet=True,
        loss=lambda outputs, batch: 0.5 * (outputs - batch[1]).square().sum(),
    )  # fmt: skip
    penalty = GroupLasso(strength=0.15, groups=groups)
    Train(epochs=400, learning_rate=0.1, weight_decay=0.0, momentum=0.0, logger="none", companions=(penalty,)).run(
        model, task
    )
    sizes = wanted.norm(dim=1 if groups == "filters" else 0, keepdim=True)
    expected = wanted * (1 - 0.15 * math.sqrt(4) / sizes).clamp(min=0)
    # Beside 0 the subgradient steps to and fro: by at most the rate times the strength, sqrt(4) * 0.15 * 0.1 = 0.03.
    gone = (expected == 0).expand_as(expected)
    assert 0 < int(gone.sum()) < gone.numel()
    assert torch.allclose(model[0].weight.detach()[~gone], expected[~gone], atol=2e-3)
    assert float(model[0].weight.detach()[gone].abs().max()) < 0.03


def gap(companions: tuple[Companion, ...], importance: str, norm: bool = True) -> float:
    """How much the loss of a trained net rises when half of its hidden units are cut, without repair."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=generator)
    y = (x[:, :4].abs() * torch.tensor([1.0, 0.9, 1.1, 1.0])).argmax(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        middle = nn.BatchNorm1d(32) if norm else nn.Identity()
        model = nn.Sequential(nn.Linear(8, 32), middle, nn.ReLU(), nn.Linear(32, 4))
    task = Task(example=x[:2], train=[(x[i : i + 64], y[i : i + 64]) for i in range(0, 256, 64)], quiet=True)
    Train(epochs=60, learning_rate=0.05, logger="none", companions=companions).run(model, task)

    def loss() -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(x), y))

    before = loss()
    model, plan = PruneChannels(sparsity=0.5, importance=importance, refit=False).run(model, task)
    assert len(plan["kept"]["0"]["out"]) == 16
    return loss() - before


@pytest.mark.parametrize(
    ("penalty", "importance"),
    [
        (ScalePenalty(strength=0.05), "batch_norm"),
        (ScalePenalty(strength=0.1, growing=True), "batch_norm"),
        (GroupLasso(strength=0.01, groups="filters", only=("0",)), "l2"),
        (GroupLasso(strength=0.01, groups="channels", only=("3",)), "l2"),
    ],
    ids=["scales", "growing", "filters", "channels"],
)
def test_a_cut_after_a_penalty_loses_less(penalty: Companion, importance: str) -> None:
    norm = isinstance(penalty, ScalePenalty)
    without, with_penalty = gap((), importance, norm), gap((penalty,), importance, norm)
    assert with_penalty < 0.1 * without


def test_nothing_to_push_is_said() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ModelError, match="group_lasso"):
        value(ScalePenalty(), model)
    with pytest.raises(ModelError, match="kernels"):
        value(GroupLasso(groups="kernels"), model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ScalePenalty(strength=-1e-4),
        lambda: GroupLasso(strength=math.inf),
        lambda: GroupLasso(groups="rows"),  # type: ignore[arg-type]
        lambda: ScalePenalty(skip="bn1"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_make_no_sense(make: Any) -> None:
    with pytest.raises(SettingsError):
        make()


def test_settings_survive_yaml() -> None:
    penalties = (ScalePenalty(strength=1e-3, skip=("bn1",)), GroupLasso(groups="kernels", growing=True))
    recipe = Recipe((Train(companions=penalties),))
    assert Recipe.parse(recipe.dump(), steps=KNOWN) == recipe
