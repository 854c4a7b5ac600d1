"""Picks one setting per site so that the least is lost within a budget: an integer program, solved by HiGHS.

    minimise    sum over sites s and settings v of  x[s, v] loss[s, v]
    subject to  sum over v of x[s, v] = 1                                for every site
                a + b (base + sum x cost + sum y k (1 - f)(1 - g)) <= budget
                x[inner, 0] >= x[outer, v]                               a site inside a dropped block stays unchanged
                y[s, t](v, w) sums to x[s, v] over w and to x[t, w] over v   for sites that share a layer

The products y are continuous: their marginals are 0 or 1, so they are too. It is a multiple-choice knapsack with nested
items, as in Shen et al., "Structural pruning via latency-saliency knapsack", arXiv:2210.06659; departures: pairs that
share a layer, and blocks that go whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tersenet.deploy.quiet import quiet_native
from tersenet.errors import require
from tersenet.search.costs import Costs, gone
from tersenet.search.sites import Picks, Site

Losses = Mapping[tuple[int, str], Sequence[float]]


def solve(sites: Sequence[Site], costs: Costs, losses: Losses, budget: float, seconds: float = 20.0) -> Picks | None:
    """The picks with the least summed loss that are predicted to cost at most `budget`; None when none do.

    Args:
        losses: site -> the loss of each of its settings; infinite for those that must not be picked.
        budget: in the unit of `costs`.
        seconds: the best that was found by then is taken.
    Raises:
        MissingExtra: when SciPy is not installed.
    """
    require("scipy", "search", "search under a budget")
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    program = _Program(sites, costs, losses)
    a, b = costs.line
    program.add(program.cost, -np.inf, (budget - a) / b - costs.base)
    rows = csr_array((program.values, (program.rows, program.columns)), shape=(len(program.low), program.size))
    allowed = np.isfinite(program.loss)
    with quiet_native():  # HiGHS prints lines for its developers
        result = milp(
            np.where(allowed, program.loss, 0.0),
            constraints=LinearConstraint(rows, program.low, program.high),
            integrality=program.whole,
            bounds=Bounds(0, allowed.astype(float)),
            options={"time_limit": seconds, "mip_rel_gap": 1e-3},
        )
    return None if result.x is None else program.picks(result.x)


class _Program:
    """Variables, rows and objective."""

    def __init__(self, sites: Sequence[Site], costs: Costs, losses: Losses) -> None:
        self.sites = sites
        self.first: dict[tuple[int, str], int] = {}
        self.size = 0
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.values: list[float] = []
        self.low: list[float] = []
        self.high: list[float] = []
        loss: list[float] = []
        self.cost: dict[int, float] = {}
        for site in sites:
            self.first[site.key] = self.size
            for index in range(len(site.settings)):
                self.cost[self.size + index] = costs.changes[site.key][index]
                loss.append(losses[site.key][index])
            self.size += len(site.settings)
        self.whole = [1] * self.size
        by_key = {site.key: site for site in sites}
        for site in sites:
            self.add({self.first[site.key] + i: 1.0 for i in range(len(site.settings))}, 1, 1)
        for outer in sites:
            for inner in sites:
                if outer.holds(inner):
                    chosen = {self.first[outer.key] + i: -1.0 for i in range(1, len(outer.settings))}
                    self.add({self.first[inner.key]: 1.0, **chosen}, 0, np.inf)
        for (left, right), extra in costs.pairs.items():
            if left in by_key and right in by_key:
                self._pair(by_key[left], by_key[right], extra)
        self.loss = np.array(loss + [0.0] * (self.size - len(loss)))
        self.whole += [0] * (self.size - len(self.whole))

    def _pair(self, left: Site, right: Site, extra: float) -> None:
        start, width = self.size, len(right.settings)
        self.size += len(left.settings) * width
        for i in range(len(left.settings)):
            self.add({self.first[left.key] + i: -1.0, **{start + i * width + j: 1.0 for j in range(width)}}, 0, 0)
            for j in range(width):
                self.cost[start + i * width + j] = extra * gone(left, i) * gone(right, j)
        for j in range(width):
            every = {start + i * width + j: 1.0 for i in range(len(left.settings))}
            self.add({self.first[right.key] + j: -1.0, **every}, 0, 0)

    def add(self, row: Mapping[int, float], low: float, high: float) -> None:
        """One constraint: low <= sum of value times variable <= high."""
        number = len(self.low)
        for column, value in row.items():
            self.rows.append(number)
            self.columns.append(column)
            self.values.append(value)
        self.low.append(low)
        self.high.append(high)

    def picks(self, x: np.ndarray) -> Picks:
        found: Picks = {}
        for site in self.sites:
            start = self.first[site.key]
            index = int(np.argmax(x[start : start + len(site.settings)]))
            if index:
                found.setdefault(site.step, {})[site.place] = site.settings[index]
        return found


def uniform(sites: Sequence[Site], costs: Costs, budget: float) -> Picks | None:
    """The same share at every site with widths, the least that fits; where none does, the most there is. None without
    widths."""
    wide = [site for site in sites if gone(site, len(site.settings) - 1) > 0]
    shares = sorted({gone(site, index) for site in wide for index in range(len(site.settings))})
    picks: Picks = {}
    for share in shares:
        picks = {}
        for site in wide:
            index = min(range(len(site.settings)), key=lambda i: abs(gone(site, i) - share))
            if index:
                picks.setdefault(site.step, {})[site.place] = site.settings[index]
        if costs.predict(picks, sites) <= budget:
            break
    return picks if wide else None
