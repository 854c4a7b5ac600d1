"""The table beside a thin network, against a truth that is known in closed form."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from made_up import Truth, block, every, width
from tersenet.search.costs import latency_costs
from tersenet.search.sites import Picks, Site
from tersenet.search.table import Table
from tersenet.search.thin import thin_costs

DEVICE: dict[str, Any] = {"cpu": "x", "cores": 1, "runtime": "r", "version": "1", "threads": 1, "batch": 1}


def network() -> tuple[list[Site], Truth]:
    """Two chains of the same kinds, a width that is alone, and a block around another width."""
    sites, pairs = [], []
    for name in ("p", "q"):
        a = width(f"{name}.1", 16, 12, 8, 4, layers=(f"{name}A", f"{name}B"), kind="first")
        b = width(f"{name}.2", 16, 12, 8, 4, layers=(f"{name}B", f"{name}C"), kind="second")
        sites += [a, b]
        pairs.append((a, b))
    lone, gate = width("lone", 8, 6, 4, 2), block("gate")
    return [*sites, lone, gate], Truth([*sites, lone, gate], pairs, {"lone": 4.0, "gate": 0.5})


class Rough(Truth):
    """Every time is off by up to 2 % of the whole network's, or of its own where that is less."""

    def times(self, candidates: Sequence[Picks], said: str, keep: Any = None) -> list[tuple[float, float]]:
        exact = super().times(candidates, said)
        chance = random.Random(len(self.asked))
        return [(ms, share * (1 + chance.uniform(-0.02, 0.02))) for ms, share in exact]


def test_a_bilinear_truth_is_exact() -> None:
    sites, truth = network()
    table = Table(DEVICE)
    costs = thin_costs(latency_costs(truth, sites, table, "net"), sites, truth, table, "net")  # type: ignore[arg-type]
    for picks in every(sites):
        assert costs.predict(picks, sites) == pytest.approx(truth(picks))
    assert all(row[0] == 0 for row in costs.changes.values())
    # A full table is not measured again.
    truth.asked.clear()
    again = thin_costs(latency_costs(truth, sites, table, "net"), sites, truth, table, "net")  # type: ignore[arg-type]
    assert not any(candidates for _, candidates in truth.asked)
    assert again.changes == costs.changes


def test_near_the_bottom_it_errs_less_than_the_table_of_the_whole_network() -> None:
    sites, truth = network()
    rough = Rough(sites, truth.chains, truth.alone)
    table = Table(DEVICE)
    whole = latency_costs(rough, sites, table, "net")  # type: ignore[arg-type]
    thin = thin_costs(whole, sites, rough, table, "net")  # type: ignore[arg-type]
    cheap = [picks for picks in every(sites) if truth(picks) < 0.35 * truth({})]
    assert len(cheap) > 10

    def error(costs: Any) -> float:
        return sum(abs(costs.sum(picks, sites) / truth(picks) - 1) for picks in cheap) / len(cheap)

    assert error(thin) < 0.5 * error(whole)
    assert error(thin) < 0.05


def test_a_block_around_widths() -> None:
    """What goes with a block is not picked inside of it, and what it saves beside thin layers is little."""
    inner = width("block.one", 16, 8, 4, layers=("block.one", "block.two"))
    outer = width("stem", 16, 8, 4, layers=("stem", "block.one"))
    sites = [outer, inner, block("block", layers=("block.one", "block.two"))]

    class Nested(Truth):
        def __call__(self, picks: Picks) -> float:
            r = picks.get(0, {}).get("stem", 16) / 16
            s = picks.get(0, {}).get("block.one", 16) / 16
            there = float("block" not in picks.get(1, {}))
            return 1 + 2 * r + there * (6 * r * s + 2 * s + 0.5)

    truth = Nested(sites, [], {})
    table = Table(DEVICE)
    costs = thin_costs(latency_costs(truth, sites, table, "net"), sites, truth, table, "net")  # type: ignore[arg-type]
    for picks in every(sites):
        if "block" not in picks.get(1, {}) or picks.get(0, {}).get("stem") == 4:
            assert costs.predict(picks, sites) == pytest.approx(truth(picks))
