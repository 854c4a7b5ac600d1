from __future__ import annotations

from collections.abc import Callable

import pytest

from tersenet.deploy.warm import Warmed, warm_up

MS = 1_000_000


def warmed(ms: Callable[[int], float], limit_ms: float = 3000.0) -> tuple[Warmed, list[float]]:
    """What a warm-up says, and the milliseconds of each call that it made, by a clock that only calls move."""
    now, log = [0], []

    def call() -> None:
        log.append(ms(len(log)))
        now[0] += round(log[-1] * MS)

    return warm_up(call, lambda: now[0], limit_ms), log


def test_a_steady_call_is_warm_after_four_windows() -> None:
    found, log = warmed(lambda i: 1.0)
    assert found == Warmed(20, 1.0, True)
    assert len(log) == 20


def test_it_goes_on_while_calls_still_become_faster() -> None:
    found, log = warmed(lambda i: 1.0 + 9.0 * 0.95**i)
    assert found.stable
    assert found.ms == pytest.approx(1.0, rel=0.05)
    assert log[-20] < 1.06
    assert len(log) > 80


def test_single_slow_calls_do_not_unsettle_it() -> None:
    found, _ = warmed(lambda i: 50.0 if i % 5 == 2 else 1.0)
    assert found == Warmed(20, 1.0, True)


def test_what_never_settles_is_left_in_time_and_said() -> None:
    found, log = warmed(lambda i: 1.0 + (i // 5) % 2, limit_ms=200)
    assert not found.stable
    assert 200 <= sum(log) <= 220


def test_fast_calls_fill_longer_windows() -> None:
    assert warmed(lambda i: 0.05)[0].calls == 5 + 3 * 50
    assert warmed(lambda i: 100.0)[0].calls == 20
