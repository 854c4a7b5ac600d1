"""A table for small budgets: what each site costs when it is given back to a network that has lost everything else.

The ordinary table is of changes to the whole network, each known to about a percent of that. A budget of an eighth is
the small rest of many such differences, and an optimiser finds the ones that err in its favour: MobileNetV2 cut to a
predicted 0.122 of its float time was measured at 0.425. Beside a network that is thin everywhere the same differences
are known ten times as well, and where they are taken is where the answer lies.

A layer whose inputs and outputs are two sites costs k (1 - f) (1 - g). Moving one of them while the other is thin shows
only k (1 - g) of that, so pairs are measured as well, both whole and the rest thin: the ordinary table's k is a
difference of three large numbers, and where it comes out as nothing by chance, an optimiser would widen both for free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tersenet.search.bench import Bench
from tersenet.search.costs import Costs, gone, sharing
from tersenet.search.sites import Picks, Site, picks_key
from tersenet.search.table import Table

# Shares of the way from the thinnest to the whole width at which a site is measured; straight lines in between.
_STOPS = (0.15, 0.3, 0.6, 1.0)


def thin_costs(costs: Costs, sites: Sequence[Site], bench: Bench, table: Table, network: str) -> Costs:
    """The costs with a new base and new changes, right for networks that are thin nearly everywhere.

    Args:
        costs: of the ordinary table.
        table: is filled where entries are missing; they are named by kind, and "thin".
        network: key of the whole network in the table.
    """
    wide = [site for site in sites if gone(site, len(site.settings) - 1) > 0]
    thinnest = {site.key: len(site.settings) - 1 for site in wide}
    thin = _picks({site: thinnest[site.key] for site in wide})
    kinds: dict[str, list[Site]] = {}
    for site in sites:
        kinds.setdefault(site.kind, []).append(site)
    wanted: list[tuple[str, int, Picks]] = []
    for kind, group in kinds.items():
        for index in _stops(group[0]):
            wanted.append((f"{kind}={group[0].settings[index]} thin", len(group), _moved(thin, sites, group, index)))
    paired: dict[str, list[tuple[Site, Site]]] = {}
    for a, b in sharing(sites):
        paired.setdefault(f"{a.kind}+{b.kind} thin", []).append((a, b))
    for key, pairs in paired.items():
        both = list({site.key: site for pair in pairs for site in pair}.values())
        wanted.append((key, len(pairs), _moved(thin, sites, both, 0)))
    missing = [each for each in wanted if each[0] not in table.changes]
    kept = table.networks[network].setdefault("timed", {})
    if missing or picks_key(thin) not in kept:
        asked = [thin, *(picks for *_, picks in missing)]
        bottom, *times = (
            costs.base * share for _, share in bench.times(asked, "filling the table of the thin network")
        )
        kept[picks_key(thin)] = bottom
        for (key, count, _), found in zip(missing, times, strict=True):
            table.changes[key] = (found - bottom) / count
        table.write()
    both_gone: dict[tuple[tuple[int, str], tuple[int, str]], float] = {}
    for key, pairs in paired.items():
        ends = {site.key: site for pair in pairs for site in pair}.values()
        alone = sum(table.changes[f"{site.kind}={site.settings[0]} thin"] for site in ends)
        terms = sum(gone(a, thinnest[a.key]) * gone(b, thinnest[b.key]) for a, b in pairs)
        more = max(0.0, (table.changes[key] * len(pairs) - alone) / terms)
        both_gone.update({(a.key, b.key): more for a, b in pairs})
    costs = dataclasses.replace(costs, pairs=both_gone)
    return _solved(costs, sites, thinnest, kept[picks_key(thin)], table)


def _stops(site: Site) -> list[int]:
    """Indices of the settings that are measured; the thinnest is what they are held against."""
    last = len(site.settings) - 1
    if gone(site, last) == 0:
        return list(range(1, last + 1))
    return sorted({last - max(1, round(stop * last)) for stop in _STOPS})


def _picks(indices: dict[Site, int]) -> Picks:
    picks: Picks = {}
    for site, index in indices.items():
        if index:
            picks.setdefault(site.step, {})[site.place] = site.settings[index]
    return picks


def _moved(thin: Picks, sites: Sequence[Site], group: Sequence[Site], index: int) -> Picks:
    """The thin network with the sites of one kind at a setting; what lies in a block that goes is not picked."""
    picks: Picks = {step: dict(places) for step, places in thin.items()}
    for site in group:
        picks.get(site.step, {}).pop(site.place, None)
        if index:
            picks.setdefault(site.step, {})[site.place] = site.settings[index]
            if gone(site, index) == 0:
                for inner in (each for each in sites if site.holds(each)):
                    picks.get(inner.step, {}).pop(inner.place, None)
    return picks


def _solved(
    costs: Costs, sites: Sequence[Site], thinnest: dict[tuple[int, str], int], bottom: float, table: Table
) -> Costs:
    """Changes from the whole network that agree with what was measured beside the thin one."""
    by_key = {site.key: site for site in sites}
    least = {key: gone(by_key[key], index) for key, index in thinnest.items()}
    changes = {key: list(row) for key, row in costs.changes.items()}
    for key, last in thinnest.items():
        site = by_key[key]
        stops = [*_stops(site), last]
        given = [0.0 if i == last else table.changes[f"{site.kind}={site.settings[i]} thin"] for i in stops]
        # What pairs say of moving this site beside thin neighbours.
        beside = sum(k * least[b if a == key else a] for (a, b), k in costs.pairs.items() if key in (a, b))
        widths = [1 - gone(site, i) for i in stops]
        own = [more + beside * (gone(site, last) - gone(site, i)) for more, i in zip(given, stops, strict=True)]
        order = np.argsort(widths)
        line = np.interp(
            [1 - gone(site, i) for i in range(last + 1)], np.array(widths)[order], np.array(own)[order]
        )  # from the thinnest
        changes[key] = (line - line[0]).tolist()
    pairs = {pair: k * least[pair[0]] * least[pair[1]] for pair, k in costs.pairs.items()}
    base = bottom - sum(changes[key][last] for key, last in thinnest.items()) - sum(pairs.values())
    for site in sites:
        if site.key in thinnest:
            continue
        inner = {key for key in thinnest if site.holds(by_key[key])}
        lost = sum(changes[key][thinnest[key]] for key in inner)
        lost += sum(term for pair, term in pairs.items() if inner & set(pair))
        changes[site.key] = [
            0.0, *(table.changes[f"{site.kind}={setting} thin"] + lost for setting in site.settings[1:])
        ]  # fmt: skip
    return dataclasses.replace(costs, base=base, changes=changes, line=(0.0, 1.0))
