"""From a budget to proposals: solved again where measuring disagrees, then compared on other images."""

from __future__ import annotations

import copy

import pytest
import torch

from made_up import block, every, instance, summed, width
from residual_net import residual_net, residual_task
from tersenet.numerics.divergence import divergence
from tersenet.pruning.drop_blocks import DropBlocks
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.search.proposals import Proposal, cheapest, compare, propose, structure
from tersenet.search.sites import Picks, find_sites
from tersenet.search.solver import solve

pytest.importorskip("scipy")


def test_a_prediction_that_holds_is_asked_once_per_kind() -> None:
    sites, costs, losses = instance(1)
    budget = 0.75 * costs.predict({}, sites)
    asked: list[Picks] = []

    def measured(candidates: list[Picks]) -> list[float]:
        asked.extend(candidates)
        return [costs.predict(picks, sites) for picks in candidates]

    found = propose(sites, costs, losses, budget, measured)
    assert [each.picks for each in found] == asked
    assert all(asked[i] != asked[j] for i in range(len(asked)) for j in range(i))
    assert "uniform" in [each.name for each in found]
    assert [each.cost for each in found] == pytest.approx([each.predicted for each in found])
    fitting = [each for each in found if each.cost <= budget]
    best = solve(sites, costs, losses, budget)
    assert best is not None
    assert min(summed(losses, each.picks, sites) for each in fitting) == pytest.approx(summed(losses, best, sites))


@pytest.mark.parametrize("off", [1.15, 0.85])
def test_a_prediction_that_misses_is_corrected(off: float) -> None:
    """Everything takes 15 % longer, or shorter, than predicted: the answers end near the budget all the same."""
    sites, costs, losses = instance(3)
    budget = 0.8 * costs.predict({}, sites)

    def measured(candidates: list[Picks]) -> list[float]:
        return [off * costs.predict(picks, sites) for picks in candidates]

    found = propose(sites, costs, losses, budget, measured)
    assert abs(found[0].cost / budget - 1) > 0.1
    assert any(0.9 * budget <= each.cost <= budget for each in found)
    assert found[0].cost == pytest.approx(off * found[0].predicted)
    assert abs(found[-1].cost / found[-1].predicted - 1) < 0.05


def test_the_cheapest() -> None:
    for seed in range(4):
        sites, costs, _ = instance(seed)

        least = min(costs.predict(picks, sites) for picks in every(sites))
        assert costs.predict(cheapest(sites, costs), sites) == pytest.approx(least, rel=2e-3)


def test_in_words() -> None:
    said = Proposal("searched", {1: {"a.one": 4, "a.two": 2}, 0: {"b": "drop"}, 2: {}}, 1.0, 1.1, 0.5)
    assert said.to_json((DropBlocks(), PruneChannels(), FoldBatchNorm())) == {
        "name": "searched", "predicted": 1.0, "measured": 1.1, "divergence": 0.5,
        "places": {"drop_blocks": 1, "prune_channels": 2},
    }  # fmt: skip


def test_comparing_on_images() -> None:
    """One half of the images repairs, the other judges."""
    model = residual_net()
    task = residual_task(model)
    steps = (DropBlocks(refit=False), PruneChannels(refit=False), FoldBatchNorm())
    sites = find_sites(steps, model, task)
    picks: Picks = {0: {"first": "drop"}, 1: {"down.conv1": 16}}
    proposals = [Proposal("one", picks, 1.0, 1.0), Proposal("two", {1: {"last.conv2": 8}}, 1.0, 1.0)]
    images = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    compare(proposals, steps, model, task, images, sites, {})
    made, _ = DropBlocks(blocks=("first",), refit=False).run(copy.deepcopy(model), task)
    made, _ = PruneChannels(widths={"down.conv1": 16}, refit=False).run(made, task)
    with torch.no_grad():
        wanted = divergence(model(images[20:]), made.eval()(images[20:]))
    assert proposals[0].loss == pytest.approx(wanted, rel=1e-4)
    assert proposals[1].loss is not None
    assert 0 < proposals[1].loss != proposals[0].loss
    built = structure(steps, picks, sites, model, task)
    assert "first.conv1.weight" not in built.state_dict()
    assert not built.training
    before, now = residual_net().state_dict(), model.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in now.items())


def test_comparing_without_images() -> None:
    sites = [width("a", 8, 4, 2), block("b")]
    losses = {(0, "a"): [0.0, 0.25, 0.5], (1, "b"): [0.0, 1.0]}
    found = [Proposal("x", {0: {"a": 2}}, 1, 1), Proposal("y", {0: {"a": 4}, 1: {"b": "drop"}}, 1, 1)]
    model = residual_net()
    compare(found, (), model, residual_task(model), None, sites, losses)
    assert [each.loss for each in found] == [0.5, 1.25]
