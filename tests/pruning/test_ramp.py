"""Ramps: the formula, the moments, growing back by hand, and a training cut anywhere that ends with the same bits."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from tersenet.bricks.mask import attach, masks, stored_weight
from tersenet.errors import SettingsError
from tersenet.pruning.prune_weights import PruneWeights
from tersenet.pruning.ramp import Ramp
from tersenet.recipe import Recipe
from tersenet.step import Companion
from tersenet.task import Task
from tersenet.train import Train

X = torch.randn(48, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(48) % 4


class Cut(Exception):
    """Stands for a power cut."""


class Batches:
    """Six batches, cut at the k-th, counted over all epochs."""

    def __init__(self, cut: int = 10**9) -> None:
        self.left = cut

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Any:
        for i in range(6):
            if self.left == 0:
                raise Cut
            self.left -= 1
            yield X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8]


def network(pattern: str = "weight") -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4))
    return PruneWeights(sparsity=0.0, pattern=pattern).run(model, Task(example=X[:2]))[0]


def training(*companions: Companion, **more: Any) -> Train:
    return Train(epochs=4, learning_rate=0.05, companions=companions, accelerator="cpu", save_every_s=0.0, **more)


def task_of(folder: Path | None = None, cut: int = 10**9) -> Task:
    return Task(example=X[:2], train=Batches(cut), folder=folder, quiet=True)


def zeros(model: nn.Module) -> float:
    found = masks(model).values()
    return sum(int((~mask.mask).sum()) for mask in found) / sum(mask.mask.numel() for mask in found)


class Watch(Companion):
    """Looks at the masks as each batch is about to be trained on; stands behind the ramp."""

    seen: ClassVar[list[tuple[float, float]]] = []

    def tick(self, model: nn.Module, progress: float) -> None:
        self.seen.append((progress, zeros(model)))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_share_of_zeros_follows_the_cubic(scope: Any) -> None:
    Watch.seen = []
    ramp = Ramp(sparsity=0.9, start=0.1, begin=0.25, end=0.75, updates=12, scope=scope)
    training(ramp, Watch()).fit(model := network(), task_of())
    assert len(Watch.seen) == 24
    for progress, share in Watch.seen:
        t = min(1.0, (progress - 0.25) / 0.5)
        assert share == pytest.approx(0.9 - 0.8 * (1 - t) ** 3 if t >= 0 else 0.0, abs=2e-3)
    assert zeros(model) == pytest.approx(0.9, abs=1e-3)


def test_between_updates_masks_stand_still() -> None:
    Watch.seen = []
    training(Ramp(sparsity=0.8, end=0.5, updates=3), Watch()).fit(network(), task_of())
    shares = [share for _, share in Watch.seen]
    assert len(set(shares)) == 4
    assert shares[:4] == [0.0] * 4
    assert len(set(shares[12:])) == 1


def test_without_growing_back_masks_only_tighten() -> None:
    model, before = network(), []

    class Look(Companion):
        def tick(self, model: nn.Module, progress: float) -> None:
            before.append({path: mask.mask.clone() for path, mask in masks(model).items()})

    training(Ramp(sparsity=0.9, updates=6), Look()).fit(model, task_of())
    for was, now in itertools.pairwise(before):
        assert not any(bool((now[path] & ~was[path]).any()) for path in was)


def test_growing_back_follows_two_thresholds() -> None:
    """One layer of ten weights at sparsity 0.5: the limit lies between what stays and what goes after the margin."""
    layer = nn.Linear(10, 1, bias=False)
    mask = attach(layer)
    mask.mask[0, 5:] = False  # the last five are gone
    ramp = Ramp(sparsity=0.5, start=0.5, regrow=True, margin=0.2)
    for back, expected in ((0.5, False), (0.7, False), (1.4, False), (1.6, True)):
        mask.mask[0] = torch.arange(10) < 5
        stored_weight(layer).data = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, back, 0.1, 0.1, 0.1, 0.1]])
        ramp.tick(layer, 0.0)
        # 1.0 is held at 1.0 * 1.2, and comes back from 1.2 / 0.8 = 1.5 on
        assert bool(mask.mask[0, 5]) is expected
        assert int(mask.mask.sum()) == 5


def test_what_is_gone_learns_on_only_where_it_may_grow_back() -> None:
    for regrow in (False, True):
        model = network()
        gone = torch.zeros_like(masks(model)["4"].mask)
        gone[:, ::2] = True
        masks(model)["4"].mask.copy_(~gone)
        before = stored_weight(model[4]).detach().clone()
        ramp = Ramp(sparsity=0.5, start=0.5, begin=0.98, end=0.99, regrow=regrow)
        training(ramp, weight_decay=0.0).fit(model, task_of())
        moved = bool((stored_weight(model[4])[gone] != before[gone]).any())
        assert moved == regrow
        assert not any(mask.regrowing for mask in masks(model).values())


def test_growing_back_brings_weights_back() -> None:
    model, seen = network(), []

    class Look(Companion):
        def tick(self, model: nn.Module, progress: float) -> None:
            seen.append(masks(model)["4"].mask.clone())

    training(Ramp(sparsity=0.7, start=0.7, updates=10, regrow=True, margin=0.0), Look()).fit(model, task_of())
    assert sum(int((now & ~was).sum()) for was, now in itertools.pairwise(seen)) > 10
    assert zeros(model) == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("regrow", [False, True])
def test_cut_at_any_batch_it_ends_with_the_same_bits(regrow: bool, tmp_path: Path) -> None:
    ramp = Ramp(sparsity=0.8, begin=0.1, end=0.7, updates=7, regrow=regrow)
    whole = network()
    training(ramp).fit(whole, task_of())
    for cut in (1, 6, 9, 13, 20):
        folder = tmp_path / str(cut)
        with pytest.raises(Cut):
            training(ramp).fit(network(), task_of(folder, cut))
        model = network()
        training(ramp).fit(model, task_of(folder))
        state, wanted = model.state_dict(), whole.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[key]) for key, value in state.items()), f"cut at batch {cut}"


def test_a_second_training_begins_its_own_ramp() -> None:
    model = network()
    training(Ramp(sparsity=0.5)).fit(model, task_of())
    training(Ramp(sparsity=0.9)).fit(model, task_of())
    assert zeros(model) == pytest.approx(0.9, abs=1e-3)


def test_what_an_earlier_training_noted_does_not_count() -> None:
    layer = nn.Linear(10, 1)
    attach(layer).enter(1)
    Ramp(sparsity=0.9, start=0.5).tick(layer, 0.0)
    assert zeros(layer) == 0.5


@pytest.mark.parametrize("pattern", ["16x1", "2:4", "filter"])
def test_masks_grow_in_their_own_pattern(pattern: str) -> None:
    model = network(pattern)
    training(Ramp(sparsity=0.5, regrow=True)).fit(model, task_of())
    mask = masks(model)["4" if pattern == "2:4" else "0"].mask
    if pattern == "2:4":
        assert bool((mask.unflatten(1, (-1, 4)).sum(dim=2) == 2).all())
    else:
        units = mask if pattern == "16x1" else mask.flatten(1).T
        assert torch.equal(units.all(dim=0), units.any(dim=0)) or pattern == "filter"
        assert float((~mask).double().mean()) == pytest.approx(0.5, abs=0.05)
    if pattern == "filter":
        assert torch.equal(mask.flatten(1).all(dim=1), mask.flatten(1).any(dim=1))


def test_masks_are_needed() -> None:
    with pytest.raises(SettingsError, match="ramp found no masks"):
        training(Ramp(sparsity=0.5)).fit(nn.Sequential(nn.Flatten(), nn.Linear(108, 4)), task_of())


def test_more_than_the_pattern_takes_is_refused() -> None:
    with pytest.raises(SettingsError, match="pattern 2:4 takes"):
        training(Ramp(sparsity=0.9)).fit(network("2:4"), task_of())


def test_recipes_can_say_it() -> None:
    text = "steps:\n- train: {epochs: 2, with: [{ramp: {sparsity: 0.9, regrow: true}}]}\n"
    recipe = Recipe.parse(text, steps={"ramp": Ramp})
    assert recipe.steps[0].companions == (Ramp(sparsity=0.9, regrow=True),)  # type: ignore[attr-defined]
    assert Recipe.parse(recipe.dump(), steps={"ramp": Ramp}) == recipe


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sparsity": 1.0}, "sparsity must lie"),
        ({"sparsity": 0.5, "start": 0.6}, "a ramp goes up"),
        ({"sparsity": 0.5, "begin": 0.8}, "0 <= begin < end < 1"),
        ({"sparsity": 0.5, "end": 1.0}, "0 <= begin < end < 1"),
        ({"sparsity": 0.5, "updates": 0}, "updates must be"),
        ({"sparsity": 0.5, "importance": "fisher"}, "importance must be one of l1, l2, lamp"),
        ({"sparsity": 0.5, "scope": "x"}, "scope must be"),
        ({"sparsity": 0.5, "margin": 1.0}, "margin must lie"),
    ],
)
def test_settings_outside_of_what_is_allowed_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Ramp(**settings)
