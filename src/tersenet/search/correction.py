"""What measured candidates say about the entries of a latency table.

An optimiser picks the entries that err in its favour, so what it proposes is slower than predicted, however small the
error on random candidates ("optimizer's curse": Smith & Winkler, Management Science 52, 2006). So every candidate that
was measured, random or proposed, is an equation about the entries that it uses, and all of them are solved together:
the entries are taken to err by normal amounts, and their most probable values are one ridge regression.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tersenet.search.costs import Costs, gone, index_of
from tersenet.search.sites import Picks, Site

# Standard deviations: of an entry as a share of itself, and of the network's time spread over its sites; of a term for
# two sites as a share of itself; of what all candidates have in common, as a share of the network; of a candidate's
# time, where the sum itself is no exact law.
_ENTRY, _FLOOR, _PAIR, _COMMON, _CANDIDATE = 0.15, 0.004, 0.3, 0.05, 0.008
_ALL = "all"


def corrected(costs: Costs, sites: Sequence[Site], seen: Sequence[tuple[Picks, float]]) -> Costs:
    """The costs with their entries moved towards what was measured.

    Args:
        costs: as the table has them.
        seen: (picks, what they cost when measured).
    """
    if not seen:
        return costs
    kinds: dict[str, float] = {}  # name of an entry -> its standard deviation
    counts: dict[str, int] = {}
    for site in sites:
        counts[site.kind] = counts.get(site.kind, 0) + 1
    for site in sites:
        for index, value in enumerate(costs.changes[site.key][1:], start=1):
            kinds[_entry(site, index)] = _ENTRY * abs(value) + _FLOOR * costs.base / counts[site.kind]
    by_key = {site.key: site for site in sites}
    for (a, b), value in costs.pairs.items():
        kinds[_pair(by_key[a], by_key[b])] = _PAIR * value
    kinds[_ALL] = _COMMON * costs.base
    column = {name: number for number, name in enumerate(kinds)}
    uses = np.zeros((len(seen), len(kinds)))
    left = np.zeros(len(seen))
    for row, (picks, got) in enumerate(seen):
        chosen = {site.key: index_of(picks, site) for site in sites}
        uses[row, column[_ALL]] = 1
        for site in sites:
            if chosen[site.key]:
                uses[row, column[_entry(site, chosen[site.key])]] += 1
        for a, b in costs.pairs:
            share = gone(by_key[a], chosen[a]) * gone(by_key[b], chosen[b])
            uses[row, column[_pair(by_key[a], by_key[b])]] += share
        left[row] = (got - costs.line[0]) / costs.line[1] - costs.sum(picks, sites)
    spread = np.array(list(kinds.values())) ** 2
    noise = (_CANDIDATE * np.array([got for _, got in seen]) / costs.line[1]) ** 2
    weights = np.linalg.solve((uses * spread) @ uses.T + np.diag(noise), left)
    moved = spread * (uses.T @ weights)
    changes = {
        site.key: [0.0]
        + [v + moved[column[_entry(site, i)]] for i, v in enumerate(costs.changes[site.key][1:], start=1)]
        for site in sites
    }
    pairs = {
        (a, b): max(0.0, value + moved[column[_pair(by_key[a], by_key[b])]]) for (a, b), value in costs.pairs.items()
    }
    line = (costs.line[0] + costs.line[1] * float(moved[column[_ALL]]), costs.line[1])
    return dataclasses.replace(costs, changes=changes, pairs=pairs, line=line)


def _entry(site: Site, index: int) -> str:
    return f"{site.kind}={site.settings[index]}"


def _pair(a: Site, b: Site) -> str:
    return f"{a.kind}+{b.kind}"
