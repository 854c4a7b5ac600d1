"""Warming up: calls that are made until the time of a call has settled.

The first calls allocate, compile, fill caches and raise the clock. How many of them that takes differs by runtime and
machine, so it is watched rather than fixed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

WINDOW_MS = 5.0
LIMIT_MS = 3000.0
SETTLED = 1.03
WINDOWS = 4


class Warmed(NamedTuple):
    """Calls made before anything was timed, the milliseconds of one then, and whether the time had settled."""

    calls: int
    ms: float
    stable: bool


def warm_up(
    call: Callable[[], Any], clock: Callable[[], int] = time.perf_counter_ns, limit_ms: float = LIMIT_MS
) -> Warmed:
    """Calls until the time of a call has settled.

    Calls are taken in windows of about 5 ms (5 to 50 calls). The time has settled when the medians of the last four
    windows lie within 3 % of each other. A machine that does not settle is left after `limit_ms`, and `stable` says so.

    Args:
        clock: nanoseconds.
    """
    medians: list[float] = []
    start, calls, size = clock(), 0, 5
    while True:
        times = []
        for _ in range(size):
            before = clock()
            call()
            times.append((clock() - before) / 1e6)
        calls += size
        medians.append(median(times))
        size = max(5, min(50, int(WINDOW_MS / max(medians[-1], 1e-6))))
        last = medians[-WINDOWS:]
        stable = len(last) == WINDOWS and max(last) <= SETTLED * min(last)
        if stable or (clock() - start) / 1e6 >= limit_ms:
            return Warmed(calls, medians[-1], stable)
