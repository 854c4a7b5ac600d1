"""Predicted costs against a truth that is known in closed form, and the line that corrects them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from made_up import Truth, block, every, width
from tersenet.errors import SettingsError
from tersenet.search.costs import CHECKS, Costs, exact_costs, fit_line, gone, latency_costs, random_picks, sharing
from tersenet.search.sites import Site
from tersenet.search.table import Table

DEVICE: dict[str, Any] = {"cpu": "x", "cores": 1, "runtime": "r", "version": "1", "threads": 1, "batch": 1}


def chains() -> tuple[list[Site], Truth]:
    """Two chains of the same kinds, one width that is alone, and a block."""
    sites, pairs = [], []
    for name in ("p", "q"):
        a = width(f"{name}.1", 16, 12, 8, 4, layers=(f"{name}A", f"{name}B"), kind="first")
        b = width(f"{name}.2", 16, 8, 4, layers=(f"{name}B", f"{name}C"), kind="second")
        sites += [a, b]
        pairs.append((a, b))
    lone, gate = width("lone", 8, 6, 4, 2), block("gate")
    sites += [lone, gate]
    return sites, Truth(sites, pairs, {"lone": 4.0, "gate": 6.0})


def test_widths_that_share_a_layer() -> None:
    sites, _ = chains()
    assert [(a.place, b.place) for a, b in sharing(sites)] == [("p.1", "p.2"), ("q.1", "q.2")]
    other = width("p.3", 16, 8, layers=("pB",), step=1)
    assert len(sharing([*sites, other])) == 2  # of another step, which sees what this one left
    assert [gone(sites[0], index) for index in range(4)] == [0, 0.25, 0.5, 0.75]
    assert gone(sites[-1], 1) == 0


def test_latency_of_a_bilinear_truth_is_exact() -> None:
    sites, truth = chains()
    table = Table(DEVICE)
    costs = latency_costs(truth, sites, table, "net")  # type: ignore[arg-type]
    assert set(costs.pairs) == {(sites[0].key, sites[1].key), (sites[2].key, sites[3].key)}
    assert all(extra == pytest.approx(5.0) for extra in costs.pairs.values())  # that of layer B alone
    assert costs.changes[sites[0].key] == pytest.approx([0, -7 / 4, -7 / 2, -7 * 3 / 4])
    assert costs.changes[sites[-1].key] == pytest.approx([0, -6])
    for picks in every(sites):
        assert costs.predict(picks, sites) == pytest.approx(truth(picks))
    assert costs.line == pytest.approx((0, 1), abs=1e-9)
    assert costs.error == pytest.approx(0, abs=1e-12)
    assert costs.fitted_error == pytest.approx(0, abs=1e-12)
    assert len(costs.checks) == CHECKS
    assert table.networks["net"]["ms"] == truth({})
    assert table.networks["net"]["float_ms"] == 2 * truth({})


def test_sites_of_one_kind_are_measured_together_and_once() -> None:
    sites, truth = chains()
    table = Table(DEVICE)
    latency_costs(truth, sites, table, "net")  # type: ignore[arg-type]
    filled = truth.asked[0][1]
    # "first" has 3 settings, "second" 2, "lone" 3, "gate" 1, and one pair of kinds.
    assert len(filled) == 3 + 2 + 3 + 1 + 1 == len(table.changes)
    assert filled[0] == {0: {"p.1": 12, "q.1": 12}}
    assert len(filled[-1][0]) == 4
    truth.asked.clear()
    again = latency_costs(truth, sites, table, "net")  # type: ignore[arg-type]
    assert sum(len(candidates) for _, candidates in truth.asked) == 0
    assert again.error == pytest.approx(0, abs=1e-12)
    # Another network with the same kinds asks for its own times and checks, and for no entry.
    latency_costs(truth, sites, table, "another")  # type: ignore[arg-type]
    assert [len(candidates) for _, candidates in truth.asked if candidates] == [CHECKS]


def test_the_line_takes_out_what_is_wrong_everywhere() -> None:
    """When everything cut together saves a fifth less than alone, the line says so."""
    sites, truth = chains()
    table = Table(DEVICE)

    def times(candidates: Any, said: str, keep: Any = None) -> list[tuple[float, float]]:
        kept = 0.8 if "random" in said else 1.0
        return [(0.0, 1 - kept * (1 - truth(picks) / truth({}))) for picks in candidates]

    truth.times = times  # type: ignore[method-assign]
    costs = latency_costs(truth, sites, table, "net")  # type: ignore[arg-type]
    assert costs.line == pytest.approx((0.2 * truth({}), 0.8))
    assert costs.error is not None
    assert costs.error > 0.03
    assert costs.fitted_error == pytest.approx(0, abs=1e-9)
    picks = {0: {"p.1": 8, "lone": 2}}
    assert costs.predict(picks, sites) == pytest.approx(0.2 * truth({}) + 0.8 * truth(picks))


def test_a_frozen_table_that_lacks_entries_is_refused(tmp_path: Path) -> None:
    sites, truth = chains()
    table = Table(DEVICE, path=tmp_path / "device.json", frozen=True)
    with pytest.raises(SettingsError, match="does not know this model; fill it on its device"):
        latency_costs(truth, sites, table, "net")  # type: ignore[arg-type]
    table.frozen = False
    latency_costs(truth, sites[:2], table, "net")  # type: ignore[arg-type]
    before = (tmp_path / "device.json").read_bytes()
    table.frozen = True
    truth.asked.clear()
    with pytest.raises(SettingsError, match=r"device\.json lacks 4 of 10 entries that this search needs") as refused:
        latency_costs(truth, sites, table, "net")  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)
    assert truth.asked == []
    assert (tmp_path / "device.json").read_bytes() == before
    # With all that it needs nothing is measured.
    costs = latency_costs(truth, sites[:2], table, "net")  # type: ignore[arg-type]
    assert sum(len(candidates) for _, candidates in truth.asked) == 0
    assert len(costs.checks) == CHECKS


def test_exact_costs() -> None:
    sites, truth = chains()
    costs = exact_costs(truth, sites, "bytes")  # type: ignore[arg-type]
    assert {kind for kind, _ in truth.asked} == {"bytes"}
    assert len(truth.asked) == 1 + (3 + 2 + 3 + 1) + 2  # unchanged, each kind once, and each pair
    for picks in every(sites):
        assert costs.predict(picks, sites) == pytest.approx(truth(picks))
    assert costs.error is None
    assert costs.fitted_error is None


def test_a_line_through_outliers() -> None:
    chance = random.Random(3)
    points = [(x, 0.7 + 1.3 * x + chance.gauss(0, 0.01)) for x in (chance.uniform(1, 5) for _ in range(40))]
    points[::5] = [(x, y + chance.choice((-4, 9))) for x, y in points[::5]]  # a fifth is far off
    a, b = fit_line(points)
    assert a == pytest.approx(0.7, abs=0.05)
    assert b == pytest.approx(1.3, abs=0.02)


def test_a_line_through_points_at_one_place() -> None:
    """No slope can be seen, so that the level alone is corrected."""
    assert fit_line([(2.0, 3.0), (2.0, 3.2), (2.0, 100.0)]) == (0.0, 1.6)


def test_the_fitted_error_leaves_each_candidate_out() -> None:
    """One of three far off: the lines through the two others judge it, by hand."""
    costs = Costs(1.0, {}, checks=[(1.0, 1.0), (2.0, 2.0), (3.0, 6.0)])
    # Without the first: through (2, 2), (3, 6): at 1 -2. Without the second: at 2 3.5. Without the third: at 3 3.
    assert costs.fitted_error == pytest.approx(0.75)  # the median of 3, 0.75 and 0.5
    assert costs.error == pytest.approx(0)
    assert Costs(1.0, {}, checks=[(1.0, 1.0), (2.0, 2.0)]).fitted_error is None


def test_random_picks() -> None:
    """From hardly anything to nearly everything, and nothing inside a dropped block that comes first."""
    sites = [block("a", step=0), width("a.one", 16, 12, 8, 4, step=1), width("b", 16, 12, 8, 4, step=1)]
    chance = random.Random(0)
    changed = []
    for strength in (0.02, 0.5, 0.98):
        drawn = [random_picks(sites, chance, strength) for _ in range(300)]
        allowed = list(every(sites))
        assert all(picks in allowed for picks in drawn)
        changed.append(sum(len(places) for picks in drawn for places in picks.values()) / len(drawn))
    assert changed[0] < 0.2 < changed[1] < changed[2]
    assert random_picks(sites, random.Random(5), 0.5) == random_picks(sites, random.Random(5), 0.5)
