"""What one search stands on: what can be picked, what it costs, and the budget in the same unit."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from tersenet.errors import SettingsError
from tersenet.progress import progressing
from tersenet.search.bench import Bench, device_of
from tersenet.search.correction import corrected
from tersenet.search.costs import Costs, exact_costs, latency_costs, network_times
from tersenet.search.proposals import Proposal, cheapest
from tersenet.search.sites import Picks, Site, context, describe, find_sites, fingerprint, picks_key
from tersenet.search.table import Table
from tersenet.search.thin import thin_costs
from tersenet.step import Step
from tersenet.task import Task

_MARGIN = 0.015
# Where the least that can be reached is more than this share of the aim, the thin network is the one to measure beside.
# So many candidates near it are timed, each with this share of its places given back by chance; what costs more than so
# many times the aim is far.
_DEEP, _LOW, _GIVEN_BACK, _FAR = 0.5, 10, 0.2, 3.0


class NoChoice(SettingsError):
    """There is nothing to pick."""


@dataclass(frozen=True)
class Budget:
    """What may be spent, and where it is measured.

    Args:
        kind: "latency", "bytes", "macs" or "memory".
        asked: as it was typed.
        value: how much, as a share of the original's where `is_share`.
        table: a latency table filled on another device; None takes this machine's own.
    """

    kind: str
    asked: str
    value: float
    is_share: bool
    runtime: str
    threads: int
    batch: int
    table: str | None = None

    def open_table(self) -> Table:
        """This device's table, or the one that was given. Raises SettingsError when that is of other settings."""
        if self.table is None:
            return Table.open(device_of(self.runtime, self.threads, self.batch))
        table = Table.read(self.table)
        table.frozen = True
        wanted = (self.runtime, self.threads, self.batch)
        was = tuple(table.device.get(key) for key in ("runtime", "threads", "batch"))
        if was != wanted:
            raise SettingsError(
                f"the table {self.table} is of {was[0]} with {was[1]} threads and batch {was[2]}, the search of "
                f"{wanted[0]}, {wanted[1]} and {wanted[2]}; give the same"
            )
        return table


class Ground:
    """One way to the budget: a network, the places where something can be picked, and what that costs.

    Args:
        steps: those of the search, or the ones of them that are tried here.
        task: with inputs of the size that is searched.
        table: of this device or another, for a latency.
        folder: for files that are timed; each ground needs its own.
        whole: the ground that was made first, whose float file costs are shares of.
        like: one with the same file when nothing is picked.
    Raises:
        NoChoice: when nothing can be picked.
    """

    def __init__(
        self,
        steps: tuple[Step, ...],
        model: nn.Module,
        task: Task,
        budget: Budget,
        table: Table | None,
        folder: Path,
        say: Callable[[str], None],
        whole: Ground | None = None,
        like: Ground | None = None,
    ) -> None:
        self.steps, self.task, self.budget, self.table, self.whole = steps, task, budget, table, whole
        # What only a special runtime or a code gains from is worth nothing but bytes.
        layers = describe(model, task.example)
        found = find_sites(steps, model, task, layers)
        self.sites = [s for s in found if budget.kind == "bytes" or not steps[s.step].special_runtime]
        if not self.sites:
            raise NoChoice("no step of the search has a choice in this model; use a recipe instead of a target")
        say(f"{len(self.sites)} places with {sum(len(site.settings) for site in self.sites)} settings")
        self.bench: Bench = Bench(
            steps, self.sites, model, task, runtime=budget.runtime, threads=budget.threads, batch=budget.batch,
            folder=folder, progress=not task.quiet, whole=None if whole is None else whole.bench,
            base=None if like is None else like.bench.base_path,
        )  # fmt: skip
        unable = []
        with progressing("trying places", len(self.sites), not task.quiet) as advance:
            for site in self.sites:
                if not self.bench.able(site):
                    unable.append(site)
                advance(1)
        if unable:
            self.sites = [site for site in self.sites if site not in unable]
            say(f"{len(unable)} places cannot be timed by changing a file, such as {unable[0].place}: left as they are")
        if not self.sites:
            raise NoChoice("no choice of the search can be timed by changing a file; use a recipe instead of a target")
        around = context(steps)
        if whole is not None and whole.task is not task:
            around += f"; float at {tuple(whole.task.example.shape[2:])}"
        self.network = fingerprint(layers, self.sites, around)

    @functools.cached_property
    def costs(self) -> Costs:
        """What picks cost. Raises SettingsError when the table that was given serves another device or model."""
        if self.table is None:
            return exact_costs(self.bench, self.sites, self.budget.kind)
        costs = latency_costs(self.bench, self.sites, self.table, self.network)
        if not self.table.frozen and self.floor > _DEEP * self.aim:
            chance = random.Random(1)
            low = [self.bottom, *(self._nearly(chance) for _ in range(_LOW))]
            costs = thin_costs(costs, self.sites, self.bench, self.table, self.network)
            # What is far from the budget says nothing of what is near it.
            near = [each for each in costs.seen if each[1] <= _FAR * self.aim]
            costs.seen = [*near, *zip(low, self.measured(low), strict=True)]
        return costs

    @functools.cached_property
    def original(self) -> float:
        """What the original's float file costs; of multiply-adds, what the network with nothing picked has."""
        if self.table is not None:
            return float(network_times(self.bench, self.table, self.network)["float_ms"])
        if self.whole is not None:
            return self.whole.original
        return self.unchanged if self.budget.kind == "macs" else self.bench.weight_of_original(self.budget.kind)

    @functools.cached_property
    def unchanged(self) -> float:
        """What the network costs with nothing picked."""
        if self.table is not None:
            return float(network_times(self.bench, self.table, self.network)["ms"])
        return self.bench.weight({}, self.budget.kind)

    @property
    def limit(self) -> float:
        """The budget in the unit of the costs."""
        return self.budget.value * (self.original if self.budget.is_share else 1.0)

    @property
    def aim(self) -> float:
        """What measured answers are held against: a latency is measured again on the file that ships, and no two
        measurements are equal."""
        return self.limit * (1 - _MARGIN) if self.budget.kind == "latency" else self.limit

    def measured(self, candidates: list[Picks]) -> list[float]:
        """The real costs of some picks, timed once; predicted ones where the table is another device's."""
        if self.table is None:
            return [self.bench.weight(picks, self.budget.kind) for picks in candidates]
        if self.table.frozen:
            return [self.costs.predict(picks, self.sites) for picks in candidates]
        known = network_times(self.bench, self.table, self.network).setdefault("timed", {})
        new = [picks for picks in candidates if picks_key(picks) not in known]
        for picks, (_, share) in zip(new, self.bench.times(new, "timing the best"), strict=True):
            known[picks_key(picks)] = self.unchanged * share
        self.table.write()
        return [known[picks_key(picks)] for picks in candidates]

    def confirmed(self, answer: Proposal) -> float:
        """The cost of an answer; a latency is measured once more, beside the float file and as files that ship are:
        each in a process of its own, which can differ from what was timed among other candidates in one process."""
        if self.table is None or self.table.frozen:
            return answer.cost
        known = self.table.networks[self.network].setdefault("confirmed", {})
        key = picks_key(answer.picks)
        if key not in known:
            known[key] = self.original * self.bench.share_of_float(answer.picks)
            self.table.write()
        return known[key]

    @functools.cached_property
    def bottom(self) -> Picks:
        """Everything taken away that can go."""
        return self._nearly(None)

    @functools.cached_property
    def floor(self) -> float:
        """What that costs: about the least that can be reached here."""
        return self.measured([self.bottom])[0]

    def _nearly(self, chance: random.Random | None) -> Picks:
        """Everything taken away; by chance something is given back at some places."""
        picks: Picks = {}
        taken: list[Site] = []
        for site in self.sites:
            if self.steps[site.step].family == "quantize" or any(other.holds(site) for other in taken):
                continue
            index = len(site.settings) - 1
            if chance is not None and chance.random() < _GIVEN_BACK:
                index = chance.randrange(len(site.settings))
            if index:
                taken.append(site)
                picks.setdefault(site.step, {})[site.place] = site.settings[index]
        return picks

    def least(self, seen: list[Proposal]) -> Proposal:
        """What costs least, whatever it hurts, by all that was measured."""
        learned = corrected(self.costs, self.sites, [*self.costs.seen, *((each.picks, each.cost) for each in seen)])
        found = []
        for picks in (cheapest(self.sites, learned), self.bottom):
            cost = self.measured([picks])[0]
            found.append(Proposal("cheapest", picks, learned.predict(picks, self.sites), cost))
        return min(found, key=lambda each: each.cost)
