"""Entries of a table that err are put right by the candidates that were measured."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from made_up import instance, width
from tersenet.search.correction import corrected
from tersenet.search.costs import Costs, random_picks
from tersenet.search.proposals import propose
from tersenet.search.sites import Picks, Site

pytest.importorskip("scipy")


def network(seed: int) -> tuple[list[Site], Costs, Costs]:
    """(sites, what they truly cost, what a table says): 24 sites of 8 kinds, entries off by 15 % at random."""
    chance = random.Random(seed)
    kinds = {f"kind {i}": sorted(chance.uniform(-4, 0) for _ in range(4))[::-1] for i in range(8)}
    sites = [width(f"layer{i}", 32, 24, 16, 12, 8, kind=f"kind {i % 8}") for i in range(24)]
    wrong = {kind: [value * (1 + chance.gauss(0, 0.15)) for value in row] for kind, row in kinds.items()}
    truth = Costs(100.0, {site.key: [0.0, *kinds[site.kind]] for site in sites})
    table = Costs(100.0, {site.key: [0.0, *wrong[site.kind]] for site in sites})
    return sites, truth, table


def test_without_measurements_nothing_moves() -> None:
    sites, _, table = network(0)
    assert corrected(table, sites, []) is table


def test_a_candidate_as_predicted_moves_nothing() -> None:
    sites, _, table = network(0)
    picks: Picks = {0: {"layer3": 16, "layer5": 8}}
    same = corrected(table, sites, [(picks, table.predict(picks, sites))])
    for key, row in table.changes.items():
        assert same.changes[key] == pytest.approx(row, abs=1e-9)


def test_one_entry_moves_by_its_share() -> None:
    """One site of one kind, off by d: the entry takes d s^2 / (s^2 + c^2 + n^2), with the standard deviations of the
    entry, of what is common to all, and of the candidate; what is common takes d c^2 of the same."""
    site = width("one", 32, 16)
    table = Costs(100.0, {site.key: [0.0, -20.0]})
    moved = corrected(table, [site], [({0: {"one": 16}}, 90.0)])
    spread, common, noise = (0.15 * 20 + 0.004 * 100) ** 2, (0.05 * 100) ** 2, (0.008 * 90) ** 2
    share = 10 / (spread + common + noise)
    assert moved.changes[site.key] == pytest.approx([0.0, -20 + spread * share])
    assert moved.line == pytest.approx((common * share, 1.0))


def test_equal_kinds_move_together() -> None:
    sites = [width("a", 32, 16, kind="k"), width("b", 32, 16, kind="k"), width("c", 32, 16)]
    table = Costs(100.0, {site.key: [0.0, -10.0] for site in sites})
    moved = corrected(table, sites, [({0: {"a": 16}}, 96.0)])
    assert moved.changes[0, "a"] == moved.changes[0, "b"]
    assert -10 < moved.changes[0, "a"][1] < -4
    assert moved.changes[0, "c"] == pytest.approx([0.0, -10.0])


@pytest.mark.parametrize("seed", range(4))
def test_random_candidates_make_the_entries_better(seed: int) -> None:
    sites, truth, table = network(seed)
    chance = random.Random(100 + seed)
    seen = [(picks, truth.predict(picks, sites)) for picks in (random_picks(sites, chance, 0.6) for _ in range(20))]
    better = corrected(table, sites, seen)

    def off(costs: Costs) -> float:
        return float(np.sqrt(np.mean([np.subtract(costs.changes[k], truth.changes[k]) ** 2 for k in truth.changes])))

    assert off(better) < 0.8 * off(table)


def test_pairs_are_corrected_too() -> None:
    sites, costs, _ = instance(2)
    (pair, value), *_ = costs.pairs.items()
    wrong = dataclasses.replace(costs, pairs={pair: 1.5 * value})
    picks: Picks = {0: {"a.one": 8, "a.two": 4}}
    got = costs.predict(picks, sites)
    moved = corrected(wrong, sites, [(picks, got)])
    assert abs(moved.predict(picks, sites) - got) < 0.2 * abs(wrong.predict(picks, sites) - got)
    assert moved.pairs[pair] < wrong.pairs[pair]


@pytest.mark.parametrize("seed", range(4))
def test_the_curse_is_lifted(seed: int) -> None:
    """What an optimiser proposes from a table that errs ends near the budget, and was not there at first."""
    sites, truth, table = network(seed)
    losses = {site.key: [0.0, 1.0, 4.0, 9.0, 16.0] for site in sites}
    found = propose(sites, table, losses, 60.0, lambda many: [truth.predict(picks, sites) for picks in many])
    own = [each for each in found if each.name == "searched"]
    assert any(0.97 * 60 <= each.cost <= 60 for each in own)
    assert abs(own[-1].predicted / own[-1].cost - 1) < 0.02
