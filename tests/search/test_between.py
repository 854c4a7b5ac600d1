"""Between an answer that misses the budget and one that keeps it, each step measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from made_up import block, instance, summed, width
from tersenet.search.between import between
from tersenet.search.costs import Costs
from tersenet.search.proposals import Proposal
from tersenet.search.search import _answers
from tersenet.search.sites import Picks


def test_a_search_halves_the_way_to_each_answer_that_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    sites, costs, losses = instance(2)
    thin: Picks = {0: {"stem": 16}, 1: {"a": "drop", "b": "drop"}}
    least, most = costs.predict(thin, sites), costs.predict({}, sites)
    missed = [Proposal("searched", {}, least, most), Proposal("uniform", {0: {"stem": 48}}, least, most)]
    monkeypatch.setattr("tersenet.search.search.propose", lambda *_: list(missed))
    ground: Any = SimpleNamespace(
        sites=sites,
        costs=costs,
        measured=lambda candidates: [costs.predict(picks, sites) for picks in candidates],
        least=lambda _: Proposal("cheapest", thin, least, least),
    )
    budget = least + 0.6 * (most - least)
    found, cheapest = _answers(ground, losses, budget, known=[])
    assert cheapest.picks == thin
    halved = [each for each in found if each.name == "between cheapest and searched"]
    assert [*missed, cheapest, *halved] == found
    best = max((each for each in found if each.cost <= budget), key=lambda each: each.cost)
    assert best in halved
    assert summed(losses, best.picks, sites) < summed(losses, thin, sites)


@pytest.mark.parametrize("curve", [1.0, 3.0])
@pytest.mark.parametrize("seed", [1, 2, 5])
def test_comes_near_the_budget_however_wrong_the_table_is(seed: int, curve: float) -> None:
    sites, costs, losses = instance(seed)
    thin: Picks = {0: {site.place: site.settings[-1] for site in sites if site.step == 0}}
    least, most = costs.predict(thin, sites), costs.predict({}, sites)

    def truth(picks: Picks) -> float:
        """From one end to the other along a curve that the table knows nothing of."""
        return least + (most - least) * ((costs.predict(picks, sites) - least) / (most - least)) ** (1 / curve)

    asked: list[Picks] = []

    def measured(candidates: list[Picks]) -> list[float]:
        asked.extend(candidates)
        return [truth(picks) for picks in candidates]

    low, high = Proposal("cheapest", thin, 0.0, least), Proposal("searched", {}, 0.0, most)
    budget = least + 0.6 * (most - least)
    found = between(sites, costs, losses, budget, (low, high), measured)
    assert [each.picks for each in found] == asked
    assert all(least <= each.predicted <= most for each in found)
    fitting = [each for each in found if each.cost <= budget]
    assert max(each.cost for each in fitting) > 0.85 * budget
    best = max(fitting, key=lambda each: each.cost)
    assert summed(losses, best.picks, sites) < summed(losses, thin, sites)


def test_a_place_moves_with_the_block_around_it() -> None:
    """The cheap end drops the block, the dear one makes a layer inside of it thinner."""
    sites = [block("b"), width("b.conv", 8, 6, 4), width("c", 8, 4, 2)]
    costs = Costs(10.0, {(1, "b"): [0.0, -4.0], (0, "b.conv"): [0.0, -0.5, -1.0], (0, "c"): [0.0, -1.0, -2.0]})
    losses = {(1, "b"): [0.0, 1.0], (0, "b.conv"): [0.0, 0.1, 0.2], (0, "c"): [0.0, 0.2, 0.9]}
    low = Proposal("cheapest", {1: {"b": "drop"}, 0: {"c": 2}}, 4.0, 4.0)
    high = Proposal("searched", {0: {"b.conv": 6}}, 9.5, 9.5)
    seen: list[Picks] = []

    def measured(candidates: list[Picks]) -> list[float]:
        seen.extend(candidates)
        return [costs.predict(picks, sites) for picks in candidates]

    found = between(sites, costs, losses, 5.1, (low, high), measured)
    assert found[-1].cost == 5.0
    assert found[-1].picks == {1: {"b": "drop"}, 0: {"c": 4}}
    for picks in seen:
        assert ("b.conv" in picks.get(0, {})) != ("b" in picks.get(1, {}))


def test_nothing_lies_between_neighbours() -> None:
    sites = [width("a", 8, 4)]
    costs, losses = Costs(2.0, {(0, "a"): [0.0, -1.0]}), {(0, "a"): [0.0, 1.0]}
    ends = Proposal("cheapest", {0: {"a": 4}}, 1.0, 1.0), Proposal("searched", {}, 2.0, 2.0)
    assert between(sites, costs, losses, 1.5, ends, lambda _: pytest.fail("measured")) == []
