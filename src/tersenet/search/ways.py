"""Ways to one budget: the steps as they stand, without those that round, or with the choices that steps keep back.

Int8 pays where layers are thick; in the thin network that a small budget asks for, float can be faster (MobileNetV2 at
an eighth of its channels on a Xeon with VNNI and AMX: 1.0 ms in float, 1.7 ms in int8, while whole it is 6.4 and 3.5).
So the ways are held against the budget by what they reach when everything goes that can go, which is one measurement,
and the first that reaches it is searched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from tersenet.errors import SettingsError
from tersenet.search.ground import Ground
from tersenet.search.sites import Picks
from tersenet.search.situations import Situation
from tersenet.step import Step
from tersenet.task import Task

# A way that reaches this share of the budget leaves something to choose. One that comes near it may reach it after all:
# what costs least need not be that everything goes.
_EASY, _NEAR = 0.93, 1.05


@dataclass(frozen=True)
class Way:
    """Args:
    steps: that are searched.
    left_out: names of steps of the search that are not among them.
    wider: whether the steps are their `wider` selves.
    notes: what is to be said of it.
    """

    steps: tuple[Step, ...]
    left_out: tuple[str, ...] = ()
    wider: bool = False
    notes: tuple[str, ...] = ()

    def moved(self, picks: Picks, steps: tuple[Step, ...]) -> Picks:
        """Picks of all steps of the search as picks of these, which are fewer."""
        places = [index for index, step in enumerate(steps) if step.name not in self.left_out]
        return {places.index(index): at for index, at in picks.items() if index in places}


def without(steps: tuple[Step, ...], names: Collection[str]) -> tuple[Step, ...]:
    """The steps but those of some names."""
    return tuple(step for step in steps if step.name not in names)


def possible_ways(steps: tuple[Step, ...], whole: Ground, widen: bool) -> tuple[list[Way], str]:
    """(ways in the order in which they are to be tried, what does not pay here at all in words).

    Args:
        whole: the ground of the steps as they stand.
        widen: whether steps may give what they keep back.
    """
    ways, note = [Way(steps)], ""
    rounding = tuple(step.name for step in steps if step.family == "quantize")
    if rounding and whole.budget.kind == "latency":
        names = ", ".join(rounding)
        plain = Way(without(steps, rounding), rounding)
        if whole.unchanged >= whole.original:
            slower = whole.unchanged / whole.original
            ways, note = [plain], f"{names} makes the network {slower:.2f}x slower than float here: left out"
        else:
            said = f"{names} does not reach the budget here, float does in a network this thin: left out"
            ways.append(Way(plain.steps, rounding, notes=(said,)))
    wide = [step.name for step in steps if step.wider() is not None]
    if widen and wide:
        said = f"the ordinary choices of {', '.join(wide)} do not reach the budget: more were taken"
        ways += [
            Way(tuple(s.wider() or s for s in way.steps), way.left_out, True, (*way.notes, said)) for way in list(ways)
        ]
    return ways, note


def first_to_reach(
    ways: list[Way],
    whole: Ground,
    situation: Situation,
    ground: Callable[[Way, Task, Ground | None], Ground],
    say: Callable[[str], None],
) -> Iterator[tuple[Way, Ground]]:
    """The ways that reach the budget in a situation with something left to choose, in their order; then those that come
    near it, the nearest first; where none does, the one that comes nearest.

    Args:
        ground: makes the ground of a way.
    """
    if len(ways) == 1:
        yield ways[0], _made(ways[0], whole, situation, ground)
        return
    others: list[tuple[float, Way, Ground]] = []
    reached = False
    for way in ways:
        try:
            there = _made(way, whole, situation, ground)
            share = there.floor / there.aim
        except SettingsError as error:
            if whole.table is None or not whole.table.frozen or way is ways[0]:
                raise
            say(f"left out: {error}")  # a table from elsewhere holds what was asked for there
            continue
        if share <= _EASY:
            reached = True
            yield way, there
        else:
            said = "; ".join(way.notes) or "the steps as they stand"
            say(f"{said}: at least {100 * share:.0f} % of the budget")
            others.append((share, way, there))
    others.sort(key=lambda each: each[0])
    for share, way, there in others:
        if share <= _NEAR or not reached:
            reached = True
            yield way, there


def _made(
    way: Way, whole: Ground, situation: Situation, ground: Callable[[Way, Task, Ground | None], Ground]
) -> Ground:
    if not situation.picks and way.steps == whole.steps:
        return whole
    return ground(way, situation.task, whole)
