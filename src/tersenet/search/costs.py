"""What picks cost, predicted from the table: the unchanged network, plus what each site's change adds, plus what two
sites that share a layer add beyond that.

A layer that loses outputs at one site and inputs at another costs t r s, with r and s the shares that are left; adding
up the two changes gives t (r + s - 1), which is t (1 - r) (1 - s) too little. So each such pair gets a term
k (1 - f) (1 - g), with f and g the shares of the two sites' channels and k from one measurement of both.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tersenet.errors import SettingsError
from tersenet.search.bench import Bench
from tersenet.search.sites import Picks, Site
from tersenet.search.table import Table

CHECKS = 20  # random candidates that the prediction is held against


@dataclass
class Costs:
    """A cost, in the unit of what is spent, that can be predicted for any picks.

    Args:
        base: of the unchanged network.
        changes: site -> what each of its settings adds; the first adds 0.
        pairs: (site, site) -> k of the term above.
        line: (a, b) with measured ~ a + b * sum, fitted on random candidates; (0, 1) until then.
        checks: (predicted, measured) of random candidates, predicted before the line was fitted.
        seen: (picks, measured) of the same candidates.
    """

    base: float
    changes: dict[tuple[int, str], list[float]]
    pairs: dict[tuple[tuple[int, str], tuple[int, str]], float] = field(default_factory=dict)
    line: tuple[float, float] = (0.0, 1.0)
    checks: list[tuple[float, float]] = field(default_factory=list)
    seen: list[tuple[Picks, float]] = field(default_factory=list)

    def predict(self, picks: Picks, sites: Sequence[Site]) -> float:
        """The cost of some picks."""
        return self.line[0] + self.line[1] * self.sum(picks, sites)

    def sum(self, picks: Picks, sites: Sequence[Site]) -> float:
        """The same before the line was fitted."""
        chosen = {site.key: index_of(picks, site) for site in sites}
        total = self.base + sum(self.changes[key][index] for key, index in chosen.items())
        by_key = {site.key: site for site in sites}
        for (a, b), extra in self.pairs.items():
            total += extra * gone(by_key[a], chosen[a]) * gone(by_key[b], chosen[b])
        return total

    @property
    def error(self) -> float | None:
        """Median relative error on the random candidates, before anything was fitted to them; None without any."""
        return float(np.median([abs(said / got - 1) for said, got in self.checks])) if self.checks else None

    @property
    def fitted_error(self) -> float | None:
        """The same with the line, each candidate predicted by the line through the others."""
        if len(self.checks) < 3:
            return None
        errors = []
        for out in range(len(self.checks)):
            a, b = fit_line([pair for index, pair in enumerate(self.checks) if index != out])
            said, got = self.checks[out]
            errors.append(abs((a + b * said) / got - 1))
        return float(np.median(errors))


def index_of(picks: Picks, site: Site) -> int:
    """Which setting of a site is picked; 0 when none is."""
    places = picks.get(site.step, {})
    return site.settings.index(places[site.place]) if site.place in places else 0


def gone(site: Site, index: int) -> float:
    """Share of a site's channels that a setting takes away; 0 for settings that are no widths."""
    first, chosen = site.settings[0], site.settings[index]
    if isinstance(first, int) and isinstance(chosen, int) and first > 0:
        return 1 - chosen / first
    return 0.0


def fit_line(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) with got ~ a + b * said, by the median of the slopes (Theil and Sen), so that outliers do no harm."""
    said, got = np.array(pairs, dtype=float).T
    rows, columns = np.triu_indices(len(said), 1)
    runs = said[columns] - said[rows]
    apart = np.abs(runs) > 1e-3 * max(float(np.abs(said).max()), 1e-12)
    if not apart.any():
        return 0.0, float(np.median(got / said))
    slope = float(np.median((got[columns] - got[rows])[apart] / runs[apart]))
    if slope <= 0:  # nothing but noise: more cannot cost less
        return 0.0, float(np.median(got / said))
    return float(np.median(got - slope * said)), slope


def sharing(sites: Sequence[Site]) -> list[tuple[Site, Site]]:
    """Pairs of sites with widths that share a layer."""
    wide = [site for site in sites if gone(site, len(site.settings) - 1) > 0]
    return [
        (a, b) for i, a in enumerate(wide) for b in wide[i + 1 :] if a.step == b.step and set(a.layers) & set(b.layers)
    ]


def latency_costs(bench: Bench, sites: Sequence[Site], table: Table, network: str) -> Costs:
    """Predicted latency, ms. What the table lacks is measured into it.

    Args:
        network: key of the unchanged network in the table.
    Raises:
        SettingsError: when the table was filled elsewhere and lacks something.
    """
    kinds: dict[str, list[Site]] = {}
    for site in sites:
        kinds.setdefault(site.kind, []).append(site)
    pair_kinds: dict[str, list[tuple[Site, Site]]] = {}
    for a, b in sharing(sites):
        pair_kinds.setdefault(f"{a.kind}+{b.kind}", []).append((a, b))
    wanted: list[tuple[str, int, Picks]] = []
    for kind, group in kinds.items():
        for index, setting in enumerate(group[0].settings[1:], start=1):
            picks: Picks = {}
            for site in group:
                picks.setdefault(site.step, {})[site.place] = site.settings[index]
            wanted.append((f"{kind}={setting}", len(group), picks))
    for kind, pairs in pair_kinds.items():
        picks = {}
        for site in {site.key: site for pair in pairs for site in pair}.values():
            picks.setdefault(site.step, {})[site.place] = _half(site)
        wanted.append((f"{kind}=half", len(pairs), picks))
    entry = network_times(bench, table, network)
    base = float(entry["ms"])
    missing = [each for each in wanted if each[0] not in table.changes]
    if missing and table.frozen:
        raise SettingsError(
            f"the table {table.path} lacks {len(missing)} of {len(wanted)} entries that this search needs, such as for "
            f"{sites[0].said}; fill it on its device with the same model: tersenet table"
        )

    def keep(found: Sequence[tuple[float, float]]) -> None:  # what is measured stays measured if the search is stopped
        for (key, count, _), (_, share) in zip(missing, found, strict=False):
            table.changes[key] = base * (share - 1) / count
        table.write()

    if missing:
        keep(bench.times([picks for *_, picks in missing], "filling the latency table", keep))
    changes = {
        site.key: [0.0, *(table.changes[f"{site.kind}={setting}"] for setting in site.settings[1:])] for site in sites
    }
    costs = Costs(base, changes)
    _pair_terms(costs, pair_kinds, table)
    _check(costs, bench, sites, table, entry)
    return costs


def _half(site: Site) -> Any:
    return site.settings[len(site.settings) // 2]


def _pair_terms(costs: Costs, pair_kinds: dict[str, list[tuple[Site, Site]]], table: Table) -> None:
    """Solves k of each kind of pair from the measurement of all its pairs at half."""
    for kind, pairs in pair_kinds.items():
        group = {site.key: site for pair in pairs for site in pair}.values()
        alone = sum(costs.changes[site.key][len(site.settings) // 2] for site in group)
        together = table.changes[f"{kind}=half"] * len(pairs)
        terms = sum(gone(a, len(a.settings) // 2) * gone(b, len(b.settings) // 2) for a, b in pairs)
        for a, b in pairs:
            costs.pairs[a.key, b.key] = max(0.0, (together - alone) / terms)


def network_times(bench: Bench, table: Table, network: str) -> dict[str, Any]:
    """What the table knows of a network; its own times are measured where it does not."""
    if network not in table.networks:
        if table.frozen:
            raise SettingsError(
                f"the table {table.path} does not know this model; fill it on its device with the same model: "
                "tersenet table"
            )
        base, plain = bench.base_times()
        table.networks[network] = {"ms": base, "float_ms": plain, "checks": []}
        table.write()
    return table.networks[network]


def _check(costs: Costs, bench: Bench, sites: Sequence[Site], table: Table, entry: dict[str, Any]) -> None:
    """Holds the prediction against random candidates, measured once per network, and fits the line to them."""
    chance = random.Random(0)
    candidates = [random_picks(sites, chance, (number + 0.5) / CHECKS) for number in range(CHECKS)]
    if len(entry["checks"]) < CHECKS and not table.frozen:
        found = bench.times(candidates, "checking the table on random candidates")
        entry["checks"] = [costs.base * share for _, share in found]
        table.write()
    if len(entry["checks"]) == CHECKS:
        costs.checks = [(costs.sum(picks, sites), got) for picks, got in zip(candidates, entry["checks"], strict=True)]
        costs.seen = list(zip(candidates, entry["checks"], strict=True))
        costs.line = fit_line(costs.checks)


def random_picks(sites: Sequence[Site], chance: random.Random, strength: float) -> Picks:
    """Random picks; strength 0 changes hardly anything, 1 nearly everything."""
    picks: Picks = {}
    taken: list[Site] = []
    for site in sites:
        if any(other.holds(site) for other in taken):
            continue
        last = len(site.settings) - 1
        if last == 1:
            index = int(chance.random() < 0.8 * strength)
            if index:
                taken.append(site)
        else:
            index = min(last, int(chance.random() * 2 * strength * (last + 1)))
        if index:
            picks.setdefault(site.step, {})[site.place] = site.settings[index]
    return picks


def exact_costs(bench: Bench, sites: Sequence[Site], kind: str) -> Costs:
    """Bytes or multiply-adds, from the files themselves: each kind of change is weighed once."""
    base = bench.weight({}, kind)
    known: dict[str, float] = {}
    changes: dict[tuple[int, str], list[float]] = {}
    for site in sites:
        row = [0.0]
        for setting in site.settings[1:]:
            key = f"{site.kind}={setting}"
            if key not in known:
                known[key] = bench.weight({site.step: {site.place: setting}}, kind) - base
            row.append(known[key])
        changes[site.key] = row
    costs = Costs(base, changes)
    for a, b in sharing(sites):
        i, j = len(a.settings) // 2, len(b.settings) // 2
        picks: Picks = {a.step: {a.place: a.settings[i], b.place: b.settings[j]}}
        extra = bench.weight(picks, kind) - base - changes[a.key][i] - changes[b.key][j]
        costs.pairs[a.key, b.key] = max(0.0, extra / (gone(a, i) * gone(b, j)))
    return costs
