"""Between an answer that misses the budget and one that keeps it: bisection with real measurements.

Where two answers differ, their places are moved from the cheap one's settings to the dear one's, what heals most per
cost first. Along such a path the cost rises from one measured end to the other, so it holds no more surprises than lie
between them, however wrong the table is there: each measurement halves what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tersenet.search.correction import corrected
from tersenet.search.costs import Costs, index_of
from tersenet.search.proposals import SLACK, Proposal
from tersenet.search.sensitivity import Losses
from tersenet.search.sites import Picks, Site

_HALVINGS = 7


def between(
    sites: Sequence[Site],
    costs: Costs,
    losses: Losses,
    budget: float,
    ends: tuple[Proposal, Proposal],
    measured: Callable[[list[Picks]], list[float]],
) -> list[Proposal]:
    """Answers on the way from one end to the other, each with what the measured ones around it say it costs.

    Args:
        ends: one that keeps the budget and one that does not, both measured.
    Returns:
        As many as it took to come within a few percent under the budget.
    """
    low, high = ends
    learned = corrected(costs, sites, [*costs.seen, (low.picks, low.cost), (high.picks, high.cost)])
    way = _way(sites, learned, losses, low.picks, high.picks)
    said = np.array([learned.predict(picks, sites) for picks in way])
    # What a step adds by the table; a step that adds nothing there is taken for a small one.
    rises = np.maximum(np.diff(said), 0.1 * max(float(np.ptp(said)), 1e-12) / len(way))
    said = np.concatenate([[0.0], np.cumsum(rises)])
    found: list[Proposal] = []
    first, last, at_first, at_last = 0, len(way) - 1, low.cost, high.cost
    for _ in range(_HALVINGS):
        if last - first < 2 or budget * (1 - SLACK) <= at_first:
            break
        likely = at_first + (said - said[first]) * (at_last - at_first) / (said[last] - said[first])
        index = first + 1 + int(np.abs(likely[first + 1 : last] - budget * (1 - SLACK / 3)).argmin())
        step = Proposal(f"between {low.name} and {high.name}", way[index], float(likely[index]), 0.0)
        step.cost = measured([step.picks])[0]
        found.append(step)
        if step.cost <= budget:
            first, at_first = index, step.cost
        else:
            last, at_last = index, step.cost
    return found


def _way(sites: Sequence[Site], costs: Costs, losses: Losses, low: Picks, high: Picks) -> list[Picks]:
    """All picks on the way, both ends among them, a setting at a time. A place inside a block that goes moves with the
    block."""
    ends = {site.key: (index_of(low, site), index_of(high, site)) for site in sites}
    moved: dict[tuple[int, str], list[Site]] = {}
    for site in sites:
        block = next((each for each in sites if each.holds(site) and len(set(ends[each.key])) > 1), site)
        moved.setdefault(block.key, []).append(site)
    steps: list[tuple[float, int, dict[tuple[int, str], int]]] = []
    for group in moved.values():
        start, end = ({site.key: ends[site.key][side] for site in group} for side in (0, 1))
        if start == end:
            continue
        gain = sum(losses[key][start[key]] - losses[key][end[key]] for key in start)
        cost = sum(costs.changes[key][end[key]] - costs.changes[key][start[key]] for key in start)
        worth = gain / max(cost, 1e-3 * costs.base / len(sites))
        stops = [end]
        if len(group) == 1:
            ((key, first),), last = start.items(), end[group[0].key]
            inner = range(first + 1, last) if last > first else range(first - 1, last, -1)
            stops = [*({key: index} for index in inner), end]
        steps += [(-worth, len(steps) + number, stop) for number, stop in enumerate(stops)]
    chosen = {key: pair[0] for key, pair in ends.items()}
    way = [_picks(sites, chosen)]
    for _, _, stop in sorted(steps, key=lambda step: step[:2]):
        chosen.update(stop)
        way.append(_picks(sites, chosen))
    return way


def _picks(sites: Sequence[Site], chosen: dict[tuple[int, str], int]) -> Picks:
    """Picks from indices; what lies in a block that goes is not picked."""
    picks: Picks = {}
    for site in sites:
        gone = any(other.holds(site) and chosen[other.key] for other in sites)
        if chosen[site.key] and not gone:
            picks.setdefault(site.step, {})[site.place] = site.settings[chosen[site.key]]
    return picks
