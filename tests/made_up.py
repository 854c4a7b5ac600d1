"""Sites without a network, for tests of what only counts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tersenet.search.costs import Costs, index_of
from tersenet.search.sites import Picks, Site


def width(place: str, *settings: int, layers: Sequence[str] = (), kind: str = "", step: int = 0) -> Site:
    """A site with numbers of channels, of a kind of its own unless one is given."""
    return Site(step, place, settings, tuple(layers) or (place,), kind or f"kind of {place}", f"words of {place}")


def block(place: str, layers: Sequence[str] = (), step: int = 1) -> Site:
    return Site(step, place, ("keep", "drop"), tuple(layers) or (place,), f"kind of {place}", f"words of {place}")


def every(sites: Sequence[Site]) -> Iterator[Picks]:
    """All picks, with nothing picked inside of what is dropped."""
    for indices in itertools.product(*(range(len(site.settings)) for site in sites)):
        changed = [site for site, index in zip(sites, indices, strict=True) if index]
        if any(outer.place + "." == inner.place[: len(outer.place) + 1] for outer in changed for inner in changed):
            continue
        picks: Picks = {}
        for site, index in zip(sites, indices, strict=True):
            if index:
                picks.setdefault(site.step, {})[site.place] = site.settings[index]
        yield picks


def summed(losses: Mapping[tuple[int, str], Sequence[float]], picks: Picks, sites: Sequence[Site]) -> float:
    return sum(losses[site.key][index_of(picks, site)] for site in sites)


def instance(seed: int) -> tuple[list[Site], Costs, dict[tuple[int, str], list[float]]]:
    """Two blocks, one with two widths that share a layer, and a width outside; random costs and losses."""
    chance = random.Random(seed)
    sites = [
        width("a.one", 32, 24, 16, 8, layers=("a.one", "a.two")),
        width("a.two", 16, 8, 4, layers=("a.two", "a.three")),
        width("b.one", 8, 4),
        width("stem", 64, 48, 32, 16),
        block("a", layers=("a.one", "a.two", "a.three")),
        block("b"),
    ]
    changes, losses = {}, {}
    for site in sites:
        more = sorted(chance.uniform(0, 3) for _ in site.settings[1:])
        hurt = sorted(chance.uniform(0, 1) for _ in site.settings[1:])
        if chance.random() < 0.3:  # thinner is not always faster
            chance.shuffle(more)
        changes[site.key] = [0.0, *(-each for each in more)]
        losses[site.key] = [0.0, *hurt]
    pairs = {(sites[0].key, sites[1].key): chance.uniform(0, 4)}
    line = (chance.uniform(-0.5, 0.5), chance.uniform(0.7, 1.3))
    return sites, Costs(20.0, changes, pairs, line), losses


class Truth:
    """Stands in for a Bench: three layers one behind another, several of them, whose times are products of what is
    left of their channels. Keeps what it was asked for."""

    def __init__(self, sites: Sequence[Site], chains: Sequence[tuple[Site, Site]], alone: Mapping[str, float]) -> None:
        self.sites, self.chains, self.alone = sites, chains, alone
        self.asked: list[tuple[str, list[Picks]]] = []

    def __call__(self, picks: Picks) -> float:
        left: dict[str, float] = {}
        for site in self.sites:
            setting: Any = site.settings[index_of(picks, site)]
            left[site.place] = setting / site.settings[0] if isinstance(setting, int) else float(setting == "keep")
        total = 1.0
        for a, b in self.chains:
            r, s = left[a.place], left[b.place]
            total += 2.0 * r + 5.0 * r * s + 3.0 * s
        return total + sum(value * left[place] for place, value in self.alone.items())

    def times(self, candidates: Sequence[Picks], said: str, keep: Any = None) -> list[tuple[float, float]]:
        self.asked.append((said, list(candidates)))
        return [(self(picks), self(picks) / self({})) for picks in candidates]

    def base_times(self) -> tuple[float, float]:
        return self({}), 2 * self({})

    def weight(self, picks: Picks, kind: str) -> float:
        self.asked.append((kind, [picks]))
        return self(picks)
