"""One option for each layer, least error in all, within a budget of bytes: which layer gets how many bits.

A multiple-choice knapsack (Kellerer, Pferschy and Pisinger, "Knapsack problems", 2004, chapter 11), solved exactly:
a Lagrange multiplier gives a bound and a good answer; partial answers are then extended layer by layer, and kept while
no other has fewer bytes and less error, and while the bound lets them win. Used for bits as in Hubara et al.,
arXiv:2006.10518, without their linear programming.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersenet.errors import SettingsError


def allocate(errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The options of least total error whose bytes fit the budget.

    Args:
        errors: of each layer, one for each of its options; they add up. Finite.
        sizes: bytes of the same options.
        budget: bytes for all layers together.
    Returns:
        The number of an option for each layer.
    Raises:
        SettingsError: where the smallest options do not fit.
    Cost: that of the partial answers kept; some thousands in practice, never more than the budget in bytes.
    """
    least = sum(min(size) for size in sizes)
    if least > budget:
        raise SettingsError(f"the budget must be at least {least} bytes, the smallest options of all, got {budget}")
    cost = [torch.tensor(list(row), dtype=torch.float64) for row in errors]
    size = [torch.tensor(list(row), dtype=torch.int64) for row in sizes]
    price, answer = _relaxed(cost, size, budget)
    reached = sum(float(row[pick]) for row, pick in zip(cost, answer, strict=True))
    # What the layers to come cost at least, in error and priced bytes.
    rest = [0.0]
    for row, bytes_each in zip(reversed(cost), reversed(size), strict=True):
        rest.append(rest[-1] + float((row + price * bytes_each.double()).min()))
    rest.reverse()
    error, used = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    trail: list[tuple[Tensor, Tensor]] = []  # for each layer, the partial answer each came from, and its option
    for layer, (row, bytes_each) in enumerate(zip(cost, size, strict=True)):
        options = len(row)
        new_error = (error[:, None] + row).flatten()
        new_used = (used[:, None] + bytes_each).flatten()
        bound = new_error + price * (new_used - budget).double() + rest[layer + 1]
        slack = 1e-9 * (abs(reached) + 1e-300)
        possible = (new_used <= budget) & (bound <= reached + slack)
        places = _undominated(new_error, new_used, possible.nonzero().flatten())
        error, used = new_error[places], new_used[places]
        trail.append((places // options, places % options))
    if not len(error):  # rounding in the bound: the answer that it came from is the best
        return answer
    place = int(error.argmin())
    picks = []
    for origin, option in reversed(trail):
        picks.append(int(option[place]))
        place = int(origin[place])
    return picks[::-1]


def _undominated(error: Tensor, used: Tensor, places: Tensor) -> Tensor:
    """Of some places, those with less error than all that use as many bytes or fewer; in order of bytes."""
    if not len(places):
        return places
    places = places[torch.argsort(error[places], stable=True)]
    places = places[torch.argsort(used[places], stable=True)]
    sorted_errors = error[places]
    before = torch.cat([torch.full((1,), torch.inf, dtype=torch.float64), sorted_errors.cummin(0).values[:-1]])
    return places[sorted_errors < before]


def _relaxed(cost: list[Tensor], size: list[Tensor], budget: int) -> tuple[float, list[int]]:
    """A price of a byte, and an answer within the budget, by halving the interval of prices."""

    def best(price: float) -> list[int]:
        picks = []
        for row, bytes_each in zip(cost, size, strict=True):
            total = row + price * bytes_each.double()
            cheapest = torch.where(total == total.min(), bytes_each, torch.iinfo(torch.int64).max)
            picks.append(int(cheapest.argmin()))
        return picks

    def weight(picks: list[int]) -> int:
        return sum(int(bytes_each[pick]) for bytes_each, pick in zip(size, picks, strict=True))

    if weight(best(0.0)) <= budget:
        return 0.0, best(0.0)
    # At this price no error is worth a byte.
    high = 1.0 + sum(float(row.max() - row.min()) for row in cost)
    low = 0.0
    for _ in range(100):
        price = (low + high) / 2
        low, high = (low, price) if weight(best(price)) <= budget else (price, high)
    return high, _filled(cost, size, best(high), budget - weight(best(high)))


def _filled(cost: list[Tensor], size: list[Tensor], picks: list[int], left: int) -> list[int]:
    """Spends what is left, each time on the largest fall of error that fits."""
    picks = list(picks)
    while True:
        gain, layer, option = 0.0, -1, -1
        for place, pick in enumerate(picks):
            fits = (size[place] - size[place][pick]) <= left
            falls = torch.where(fits, cost[place][pick] - cost[place], -1.0)
            if float(falls.max()) > gain:
                gain, layer, option = float(falls.max()), place, int(falls.argmax())
        if layer < 0:
            return picks
        left -= int(size[layer][option] - size[layer][picks[layer]])
        picks[layer] = option
