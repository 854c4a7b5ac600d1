"""The integer program, held against trying everything; the uniform policy; and silence on standard output."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from made_up import block, every, instance, summed, width
from tersenet.search.costs import Costs, gone
from tersenet.search.sites import Picks
from tersenet.search.solver import solve, uniform

pytest.importorskip("scipy")


@pytest.mark.parametrize("seed", range(12))
def test_the_best_of_all_picks(seed: int) -> None:
    sites, costs, losses = instance(seed)
    whole = costs.predict({}, sites)
    for part in (0.4, 0.6, 0.75, 0.9):
        fitting = [picks for picks in every(sites) if costs.predict(picks, sites) <= part * whole + 1e-9]
        found = solve(sites, costs, losses, part * whole)
        if not fitting:
            assert found is None
            continue
        assert found is not None
        least = min(summed(losses, picks, sites) for picks in fitting)
        assert costs.predict(found, sites) <= part * whole + 1e-6
        assert found in list(every(sites))  # nothing inside a dropped block
        assert least - 1e-9 <= summed(losses, found, sites) <= least * 1.0011 + 1e-9


def test_the_instances_are_not_too_easy() -> None:
    """Some answers drop a block, some cut two widths that share a layer, and some budgets cannot be met."""
    dropped = paired = impossible = 0
    for seed in range(12):
        sites, costs, losses = instance(seed)
        for part in (0.4, 0.6, 0.75, 0.9):
            found = solve(sites, costs, losses, part * costs.predict({}, sites))
            impossible += found is None
            dropped += bool(found and 1 in found)
            paired += bool(found and {"a.one", "a.two"} <= set(found.get(0, {})))
    assert min(dropped, paired, impossible) >= 3


def test_pairs_are_counted() -> None:
    """Both widths at half look like 100 - 40 - 40 = 20, and cost 20 + 60 x 0.25 = 35."""
    sites = [width("a", 8, 4, layers=("x", "y")), width("b", 8, 4, layers=("y", "z"))]
    changes = {site.key: [0.0, -40.0] for site in sites}
    losses = {site.key: [0.0, 1.0] for site in sites}
    assert solve(sites, Costs(100.0, changes), losses, 30.0) == {0: {"a": 4, "b": 4}}
    paired = Costs(100.0, changes, {(sites[0].key, sites[1].key): 60.0})
    assert solve(sites, paired, losses, 30.0) is None
    assert solve(sites, paired, losses, 35.01) == {0: {"a": 4, "b": 4}}


def test_a_block_goes_whole() -> None:
    """Dropping the block and thinning its inside would save twice what there is."""
    sites = [width("a.one", 8, 4), block("a"), block("ab")]
    changes = {sites[0].key: [0.0, -30.0], sites[1].key: [0.0, -40.0], sites[2].key: [0.0, -1.0]}
    losses = {site.key: [0.0, 1.0] for site in sites}
    costs = Costs(100.0, changes)
    assert solve(sites, costs, losses, 59.5) == {1: {"a": "drop", "ab": "drop"}}
    assert solve(sites, costs, losses, 50.0) is None
    assert solve(sites, costs, losses, 69.5) == {1: {"a": "drop"}}  # "ab" does not lie in "a"


def test_what_must_not_be_picked() -> None:
    sites = [width("a", 8, 4), width("b", 8, 4)]
    costs = Costs(100.0, {site.key: [0.0, -40.0] for site in sites})
    losses = {sites[0].key: [0.0, math.inf], sites[1].key: [0.0, 5.0]}
    assert solve(sites, costs, losses, 60.0) == {0: {"b": 4}}
    assert solve(sites, costs, losses, 20.0) is None


def test_enough_budget_changes_nothing() -> None:
    sites, costs, losses = instance(0)
    assert solve(sites, costs, losses, costs.predict({}, sites) + 1e-6) == {}


@pytest.mark.parametrize("seed", range(4))
def test_uniform(seed: int) -> None:
    """The same share everywhere, the least that fits: held against trying all shares."""
    sites, costs, _ = instance(seed)
    wide = sites[:4]
    shares = sorted({1 - setting / site.settings[0] for site in wide for setting in site.settings})

    def at(share: float) -> Picks:
        picks: Picks = {}
        for site in wide:
            nearest = min(site.settings, key=lambda setting: abs(1 - setting / site.settings[0] - share))
            if nearest != site.settings[0]:
                picks.setdefault(0, {})[site.place] = nearest
        return picks

    for part in (0.8, 0.9, 0.95):
        budget = part * costs.predict({}, sites)
        fitting = [share for share in shares if costs.predict(at(share), sites) <= budget]
        found = uniform(sites, costs, budget)
        assert found == at(fitting[0] if fitting else shares[-1])
        assert found is not None
        assert 1 not in found  # no blocks
    assert uniform(sites[4:], costs, budget) is None
    assert gone(sites[4], 1) == 0


def test_nothing_reaches_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS prints lines for its developers, which would spoil --json; also by way of C's own buffer."""
    for seed in range(12):
        sites, costs, losses = instance(seed)
        for part in (0.5, 0.7):
            solve(sites, costs, losses, part * costs.predict({}, sites), seconds=5.0)
    assert capfd.readouterr().out == ""


LOUD = """
import ctypes, sys
import scipy.optimize as optimize
from made_up import instance
from tersenet.search.solver import solve

real = optimize.milp
def loud(*arguments, **named):
    ctypes.CDLL(None).puts(b"HighsMipSolverData::developer line")  # stays in C's buffer when stdout is a pipe
    print("from Python")
    return real(*arguments, **named)
optimize.milp = loud
sites, costs, losses = instance(0)
assert solve(sites, costs, losses, 0.7 * costs.predict({}, sites))
print("{}")
"""


def test_a_loud_solver_does_not_spoil_json() -> None:
    """What native code left in its buffer when it returned must not come out when the process ends."""
    ended = subprocess.run(
        [sys.executable, "-c", LOUD], capture_output=True, text=True, check=False,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "{}\n"
