"""The order in which contenders take turns, and how many calls each turn has; who calls them is another matter.

In one process (`tersenet.deploy.measure`) or each in its own (`tersenet.deploy.apart`), the schedule is the same:
rounds in an order shuffled anew, so that what drifts is shared.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping

from tersenet.errors import SettingsError

LEAST_TURNS = 20
LEAST_CALLS = 5
SLOW_MS = 5.0  # a slower call gets fewer calls per turn, so that a turn stays near `calls` times this
Key = tuple[str, str]
# Plays one turn of this contender with so many discarded and so many timed calls.
Turn = Callable[[Key, int, int], None]


def check_schedule(turns: int, calls: int, discard: int, threads: int, least_turns: int = LEAST_TURNS) -> None:
    """Raises SettingsError on fewer turns or calls than the intervals can rest on."""
    if turns < least_turns or calls < LEAST_CALLS or discard < 0 or threads < 1:
        raise SettingsError(
            f"turns must be at least {least_turns}, calls {LEAST_CALLS}, discard 0 and threads 1, "
            f"got {turns}, {calls}, {discard} and {threads}"
        )


def play(
    speeds: Mapping[Key, float],
    turn: Turn,
    *,
    turns: int,
    calls: int,
    discard: int,
    seed: int,
    cold: bool,
    budget_s: float | None,
    progress: bool,
) -> None:
    """Lets every contender take its turns.

    Args:
        speeds: roughly the milliseconds of one call of each, which say how many calls fit in a turn.
        turn: called once per contender and round.
        turns, calls, discard, seed, cold, budget_s, progress: as in `tersenet.deploy.measure.measure`.
    """
    if cold:
        rounds = _cold_rounds(turns * calls, speeds, budget_s)
        plan = dict.fromkeys(speeds, (0, 1))
    else:
        rounds = turns
        share = None if budget_s is None else budget_s * 1e3 / (turns * len(speeds))
        plan = {key: _calls(ms, calls, discard, share) for key, ms in speeds.items()}
    shuffled, order = random.Random(seed), list(speeds)
    with _bar("measuring", enabled=progress) as bar:
        for done in range(rounds):
            shuffled.shuffle(order)
            for key in order:
                turn(key, *plan[key])
            bar(done + 1, rounds)


def _calls(ms: float, calls: int, discard: int, share_ms: float | None) -> tuple[int, int]:
    """(discarded, timed) calls of one turn that fit in this many milliseconds (None: as many as 5 ms calls would)."""
    share = calls * SLOW_MS if share_ms is None else share_ms * calls / (calls + discard)
    timed = max(LEAST_CALLS, min(calls, int(share / max(ms, 1e-6))))
    return math.ceil(discard * timed / calls), timed


def _cold_rounds(rounds: int, speeds: Mapping[Key, float], budget_s: float | None) -> int:
    """Rounds of single calls; as many as a warm measurement times calls, or as fit, but at least 20 turns of 5."""
    round_ms = max(sum(speeds.values()), 1e-6)
    fitting = rounds * SLOW_MS * len(speeds) if budget_s is None else budget_s * 1e3
    return max(LEAST_TURNS * LEAST_CALLS, min(rounds, int(fitting / round_ms)))


@contextlib.contextmanager
def _bar(what: str, enabled: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error that draws only between turns: a drawing thread would disturb the timing."""
    if not enabled:
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), auto_refresh=False) as bar:
        line = bar.add_task(what, total=None)

        def show(done: int, total: int) -> None:
            bar.update(line, completed=done, total=total, refresh=True)

        yield show
