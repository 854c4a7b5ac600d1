"""PruneWeights: how much goes and what, against counts and brute force; tighter masks; repair; refusals."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import task_for, tiny
from tersenet.bricks.mask import attach, masks, stored_weight
from tersenet.errors import DataError, ModelError, NoEffect, SettingsError, TraceError
from tersenet.findings import collecting
from tersenet.numerics.divergence import divergence
from tersenet.numerics.patterns import parse
from tersenet.pruning import refit as refit_module
from tersenet.pruning.choose import Cutoff, Scored, choose
from tersenet.pruning.prune_weights import PruneWeights
from tersenet.pruning.sound import NOTHING_TO_RECONSTRUCT_ON, UNDONE
from tersenet.pruning.weight_scores import IMPORTANCES, scores_of
from tersenet.recipe import Recipe
from tersenet.task import Task

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = [(X[:32], torch.arange(32) % 5), (X[32:], torch.arange(32) % 5)]
TASK = Task(example=X[:2], train=DATA, calibrate=DATA, quiet=True)


def network() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 32, 3, stride=2),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    model.train()
    for _ in range(20):
        model(X)  # norm statistics that are those of the data
    return model.eval()


def pruned(model: nn.Module | None = None, **settings: Any) -> nn.Module:
    return PruneWeights(**settings).run(model or network(), TASK)[0]


def share(model: nn.Module) -> float:
    found = masks(model).values()
    return sum(int((~mask.mask).sum()) for mask in found) / sum(mask.mask.numel() for mask in found)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.999])
def test_the_share_of_single_weights_is_exact(sparsity: float, scope: Any) -> None:
    model = pruned(sparsity=sparsity, scope=scope)
    sizes = {path: mask.mask.numel() for path, mask in masks(model).items()}
    zeros = {path: int((~mask.mask).sum()) for path, mask in masks(model).items()}
    if scope == "global":
        assert sum(zeros.values()) == round(sparsity * sum(sizes.values()))
    else:
        assert zeros == {path: min(size - 1, round(sparsity * size)) for path, size in sizes.items()}


def test_the_smallest_go_in_each_layer_or_of_all() -> None:
    model = network()
    weights = torch.cat([model[i].weight.detach().abs().flatten() for i in (0, 3, 7)])
    limit = float(weights.sort().values[round(0.6 * len(weights))])
    everywhere = pruned(copy.deepcopy(model), sparsity=0.6, scope="global")
    each = pruned(copy.deepcopy(model), sparsity=0.6)
    for path, mask in masks(everywhere).items():
        size = model.get_submodule(path).weight.detach().abs()
        assert torch.equal(mask.mask, size >= limit)
        own = masks(each)[path].mask
        assert size[own].min() > size[~own].max()


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_every_importance_chooses(importance: str) -> None:
    first = pruned(sparsity=0.5, importance=importance)
    again = pruned(sparsity=0.5, importance=importance)
    assert share(first) == pytest.approx(0.5, abs=1e-3)
    assert all(torch.equal(mask.mask, masks(again)[path].mask) for path, mask in masks(first).items())
    same = all(torch.equal(mask.mask, masks(pruned(sparsity=0.5))[path].mask) for path, mask in masks(first).items())
    assert same == (importance in ("l1", "l2"))  # lamp compares layers


def test_a_block_goes_as_a_whole_and_the_rest_counts_for_what_it_is() -> None:
    model = pruned(sparsity=0.5, pattern="16x1")
    mask = masks(model)["0"].mask  # 20 output channels: blocks of 16 and of 4
    assert mask.shape == (20, 3, 3, 3)
    for block in (mask[:16], mask[16:]):
        assert torch.equal(block.all(dim=0), block.any(dim=0))
    assert share(model) == pytest.approx(0.5, abs=0.02)


def test_filters_and_layers_are_never_emptied() -> None:
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    for cutoff in (Cutoff(share=0.99), Cutoff(value=100.0), Cutoff(percentile=100.0)):
        for name in ("weight", "filter", "16x1"):
            scored = {"a": Scored(scores, torch.ones(2, 2, dtype=torch.bool), parse(name))}
            scored["b"] = Scored(scores / 1000, torch.ones(2, 2, dtype=torch.bool), parse(name))
            for kept in choose(scored, cutoff, "global").values():
                assert bool(kept[1, 1])  # the best


def test_percentile_and_value_are_thresholds_on_scores() -> None:
    model = network()
    sizes = model[3].weight.detach().abs()
    by_value = masks(pruned(copy.deepcopy(model), threshold=0.03))["3"].mask
    assert torch.equal(by_value, sizes >= 0.03)
    limit = np.percentile(sizes.double().numpy(), 90)
    by_percentile = masks(pruned(copy.deepcopy(model), percentile=90.0))["3"].mask
    assert torch.equal(by_percentile, sizes >= limit)
    means = sizes.mean(dim=(1, 2, 3))
    by_filter = masks(pruned(copy.deepcopy(model), threshold=0.04, pattern="filter"))["3"].mask
    assert torch.equal(by_filter[:, 0, 0, 0], means >= 0.04) or bool(means.max() < 0.04)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_two_of_four_along_the_input_channels(kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(8, 6, 3))
    task = Task(example=torch.randn(2, 8, 5, 5))
    mask = masks(PruneWeights(pattern="2:4").run(model, task)[0])["0"].mask
    inputs = mask if kind is nn.Conv2d else mask.transpose(0, 1)
    assert torch.equal(inputs.unflatten(1, (2, 4)).sum(dim=2), torch.full((6, 2, 3, 3), 2))


def test_half_way_to_two_of_four_takes_only_what_may_go() -> None:
    model = pruned(sparsity=0.2, pattern="2:4")
    kept = masks(model)["3"].mask.unflatten(1, (5, 4)).sum(dim=2)
    assert kept.min() >= 2
    assert float((~masks(model)["3"].mask).double().mean()) == pytest.approx(0.2, abs=1e-3)


def test_layers_with_nothing_to_lose_get_no_mask() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1))
    plan = PruneWeights(pattern="2:4").plan(model, Task(example=torch.zeros(2, 4, 5, 5)))
    assert plan == {"masks": {"1": "2:4"}}


def test_frozen_and_skipped_layers_are_left_alone() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    assert set(PruneWeights(skip=("linear",)).plan(model, TASK)["masks"]) == {"3"}
    with pytest.warns(NoEffect):
        PruneWeights(skip=("*",)).run(model, TASK)


def test_a_second_time_tightens() -> None:
    once = pruned(sparsity=0.5)
    twice = pruned(copy.deepcopy(once), sparsity=0.8)
    assert share(twice) == pytest.approx(0.8, abs=1e-3)
    for path, mask in masks(twice).items():
        assert not bool((mask.mask & ~masks(once)[path].mask).any())
    looser = pruned(copy.deepcopy(once), sparsity=0.2)
    assert all(torch.equal(mask.mask, masks(once)[path].mask) for path, mask in masks(looser).items())
    blocks = pruned(copy.deepcopy(once), sparsity=0.8, pattern="16x1")
    assert share(blocks) == pytest.approx(0.8, abs=0.02)
    assert masks(blocks)["0"].pattern == "16x1"


def test_a_layer_skipped_the_second_time_keeps_its_mask() -> None:
    once = pruned(sparsity=0.5)
    twice = pruned(copy.deepcopy(once), sparsity=0.9, skip=("7",))
    assert torch.equal(masks(twice)["7"].mask, masks(once)["7"].mask)
    assert not torch.equal(masks(twice)["3"].mask, masks(once)["3"].mask)


@pytest.mark.parametrize("pattern", ["weight", "16x1"])
def test_refit_brings_the_outputs_back(pattern: str) -> None:
    model = network()
    wanted = model(X).detach()

    def error(found: nn.Module) -> float:
        return float((found(X).detach() - wanted).norm() / wanted.norm())

    bare = error(pruned(copy.deepcopy(model), sparsity=0.6, pattern=pattern, refit=False))
    repaired = pruned(copy.deepcopy(model), sparsity=0.6, pattern=pattern, refit=True)
    assert error(repaired) < 0.6 * bare
    assert share(repaired) == pytest.approx(0.6, abs=0.02)
    assert not any(module.training for module in repaired.modules())


def numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = numbers(one), numbers(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_layers_are_reconstructed_by_default_where_there_are_inputs() -> None:
    by_default, wanted = pruned(sparsity=0.8), pruned(sparsity=0.8, refit=True)
    assert same(by_default, wanted)
    assert not same(by_default, pruned(sparsity=0.8, refit=False))
    unlabelled = dataclasses.replace(TASK, train=None, calibrate=[(x,) for x, _ in DATA])
    assert same(PruneWeights(sparsity=0.8).run(network(), unlabelled)[0], wanted)
    assert same(pruned(sparsity=0.0), pruned(sparsity=0.0, refit=False))  # masks for a ramp cost nothing


def test_without_inputs_the_weights_that_stay_are_as_they_were_and_it_is_said() -> None:
    bare = Task(example=X[:2], quiet=True)
    with collecting() as said:
        found, _ = PruneWeights(sparsity=0.8).run(network(), bare)
    assert said == [NOTHING_TO_RECONSTRUCT_ON]
    with collecting() as said:
        assert same(PruneWeights(sparsity=0.8, refit=False).run(network(), bare)[0], found)
        PruneWeights(sparsity=0.0).run(network(), bare)
    assert said == []
    assert PruneWeights(sparsity=0.8).data_needed() == "nothing"


class Branching(nn.Module):
    """Cannot be captured: what it computes depends on the values that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if float(x.detach().sum()) > 0 else -self.linear(x)


def test_a_model_that_cannot_be_captured_is_pruned_by_default_and_not_when_reconstruction_is_asked_for() -> None:
    x = torch.rand(8, 6)
    task = Task(example=x[:2], calibrate=[(x,)], quiet=True)
    with collecting() as said:
        found, _ = PruneWeights(sparsity=0.5).run(Branching(), task)
    assert masks(found)["linear"].sparsity == 0.5
    assert len(said) == 1
    assert said[0].startswith("the layers cannot be reconstructed, so the weights that stay are as they were: ")
    with pytest.raises(TraceError):
        PruneWeights(sparsity=0.5, refit=True).run(Branching(), task)


@pytest.mark.parametrize("factor", [1e6, float("nan")])
def test_a_reconstruction_that_blows_up_is_undone_and_said(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    real = refit_module._fit

    def blowing(layer: Any, *args: Any) -> None:
        real(layer, *args)
        stored_weight(layer).mul_(factor)

    monkeypatch.setattr(refit_module, "_fit", blowing)
    with collecting() as said:
        found = pruned(sparsity=0.5)
    assert said == [UNDONE]
    assert same(found, pruned(sparsity=0.5, refit=False))


def test_refit_leaves_a_model_alone_that_loses_nothing() -> None:
    model = network()
    for i in (0, 3, 7):
        with torch.no_grad():
            model[i].weight[:, 1] = 0.0
    wanted = model(X)
    found = pruned(copy.deepcopy(model), threshold=1e-12, refit=True)
    assert share(found) > 0.02
    assert torch.allclose(found(X), wanted, atol=1e-5)


def test_one_layer_is_refitted_to_its_least_squares_solution() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 12) @ torch.randn(12, 12)
    task = Task(example=x[:2], calibrate=[(x, torch.zeros(300))])
    layer = nn.Linear(12, 3)
    wanted = layer(x).detach()
    found, _ = PruneWeights(sparsity=0.5, refit=True).run(nn.Sequential(layer), task)
    mask = masks(found)["0"].mask
    for row in range(3):
        matrix = torch.cat([x[:, mask[row]], torch.ones(300, 1)], dim=1).double()
        best = torch.linalg.lstsq(matrix, wanted[:, row : row + 1].double()).solution.flatten()
        assert torch.allclose(found[0].weight[row, mask[row]].double(), best[:-1], atol=0.02)
        assert float(found[0].bias[row].detach()) == pytest.approx(float(best[-1]), abs=0.02)


def test_grouped_convolutions_are_refitted_group_by_group() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3, groups=2))
    x = torch.randn(64, 6, 8, 8)
    x[:, 1::2] += x[:, ::2]  # inputs that can stand in for one another
    task = Task(example=x[:2], calibrate=[(x, torch.zeros(64))])
    wanted = model(x)

    def error(refit: bool) -> float:
        found, _ = PruneWeights(sparsity=0.5, refit=refit).run(copy.deepcopy(model), task)
        return float(F.mse_loss(found(x), wanted).detach())

    assert error(True) < 0.8 * error(False)


def test_weights_that_are_no_numbers_are_refused() -> None:
    model = network()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ModelError, match="weights of 3 hold NaN"):
        pruned(model)


def test_data_is_asked_for_where_it_is_needed() -> None:
    bare = Task(example=X[:2])
    assert PruneWeights().data_needed() == "nothing"
    for step in (PruneWeights(importance="fisher"), PruneWeights(importance="obs"), PruneWeights(refit=True)):
        assert step.data_needed() == "inputs"
        with pytest.raises(DataError):
            step.run(network(), bare)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sparsity": 1.0}, "sparsity must lie in"),
        ({"sparsity": float("nan")}, "sparsity must lie in"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "takes 0.5 of the weights at most"),
        ({"pattern": "5"}, "pattern is '5'"),
        ({"importance": "size"}, "importance must be one of l1"),
        ({"scope": "all"}, "scope must be auto, layer or global"),
        ({"percentile": 101.0}, "percentile must lie"),
        ({"threshold": -1.0}, "threshold must be"),
        ({"sparsity": 0.5, "threshold": 0.1}, "both set"),
        ({"samples": 0}, "samples must be"),
    ],
)
def test_settings_outside_of_what_is_allowed_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        PruneWeights(**settings)


def test_another_model_s_plan_is_refused() -> None:
    with pytest.raises(SettingsError, match="which this model has not"):
        PruneWeights().apply(network(), {"masks": {"9": "weight"}})
    with pytest.raises(SettingsError, match="BatchNorm2d here"):
        PruneWeights().apply(network(), {"masks": {"1": "weight"}})


def test_the_root_itself_can_be_masked() -> None:
    layer = nn.Linear(8, 4)
    found, plan = PruneWeights(sparsity=0.5).run(layer, Task(example=torch.zeros(2, 8)))
    assert plan == {"masks": {"": "weight"}}
    assert masks(found)[""].sparsity == 0.5


def test_numbers_under_the_mask_stay() -> None:
    model = network()
    found = pruned(copy.deepcopy(model), sparsity=0.9, refit=False)
    assert torch.equal(stored_weight(found[3]), model[3].weight)


def test_planning_on_a_masked_model_leaves_it_and_its_pattern() -> None:
    model = network()
    attach(model[3], "kernel")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = PruneWeights(pattern="16x1").plan(model, TASK)
    assert plan["masks"]["3"] == "16x1"
    assert masks(model)["3"].pattern == "kernel"


def test_another_seed_draws_other_weights() -> None:
    layers = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}
    drawn = [
        scores_of(nn.Identity(), layers, Task(example=torch.zeros(2, 8), seed=seed), "random", 1) for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0]["a"], drawn[1]["a"])
    assert not torch.equal(drawn[0]["a"], drawn[2]["a"])
    assert not torch.equal(drawn[0]["a"], drawn[0]["b"])


def test_layer_by_layer() -> None:
    """Each layer its own share and pattern; the others stay whole, and the plan makes the same masks again."""
    model = tiny()
    task = task_for(model)
    step = PruneWeights(layers={"conv2": "0.75", "linear": "0.5 2x1"})
    made, plan = step.run(copy.deepcopy(model), task)
    assert plan == {"masks": {"conv2": "weight", "linear": "2x1"}}
    layers = dict(made.named_modules())
    assert float((layers["conv2"].weight == 0).double().mean()) == pytest.approx(0.75)
    assert float((layers["linear"].weight == 0).double().mean()) == pytest.approx(0.5)
    pairs = (layers["linear"].weight == 0).reshape(3, 2, 16)
    assert bool((pairs[:, 0] == pairs[:, 1]).all())
    assert bool((layers["conv1"].weight != 0).all())
    assert Recipe.parse(Recipe((step,)).dump()) == Recipe((step,))
    # Without an amount a search chooses; with one the step is part of every candidate.
    assert PruneWeights().tunable
    assert not step.tunable
    assert not PruneWeights(sparsity=0.5).tunable
    choices = PruneWeights(pattern="2:4").choices(model, task)
    assert set(choices) == {"block.conv", "conv2", "pointwise"}  # the others are too small, or have nothing to lose
    assert choices["conv2"] == ["0", "0.5"]
    assert PruneWeights().choices(model, task)["conv2"] == ["0", "0.5", "0.7", "0.8", "0.9"]
    assert PruneWeights().chosen({"conv2": "0", "linear": "0.7"}) == PruneWeights(layers={"linear": "0.7"})
    assert PruneWeights().chosen({"conv2": "0"}) is None


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({"conv2": "half"}, "layers has 'half'; write a sparsity, and a pattern where it is another"),
        ({"conv2": "0.5 diagonal"}, "pattern is 'diagonal'"),
        ({"conv2": "1.0"}, "sparsity must lie in"),
        ({"conv2": "0.9 2:4"}, "takes 0.5 of the weights at most"),
        ({"nothing": "0.5"}, "layers names 'nothing', which is no layer here that can be masked"),
    ],
)
def test_bad_layers(layers: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        PruneWeights(layers=layers).plan(tiny(), task_for(tiny()))
    with pytest.raises(SettingsError, match="layers and sparsity are both set"):
        PruneWeights(layers={"conv2": "0.5"}, sparsity=0.5)


def test_a_search_weighs_shares_without_moving_what_stays_unless_asked_to() -> None:
    model = tiny()
    task = task_for(model)
    images = task.inputs_like(model, 32)
    found = PruneWeights().sensitivities(model, task, images)
    assert {path: list(row) for path, row in found.items()} == PruneWeights().choices(model, task)
    made, _ = PruneWeights(layers={"conv2": "0.8"}, refit=False).run(copy.deepcopy(model), task)
    with torch.no_grad():
        assert found["conv2"]["0.8"] == pytest.approx(divergence(model(*images), made(*images)), rel=1e-4)
    assert found["conv2"]["0"] == 0.0
    assert found["conv2"]["0.5"] < found["conv2"]["0.9"]
    assert PruneWeights(refit=True).sensitivities(model, task, images) == {}
