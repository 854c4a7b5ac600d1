"""What takes long says how long it still takes: a bar at a terminal, lines elsewhere, nothing when quiet."""

from __future__ import annotations

import pytest

from tersenet import progress
from tersenet.progress import progressing


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_where_there_is_no_terminal_a_line_says_the_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progressing("timing candidates", 10, shown=True) as advance:
        for _ in range(10):
            clock[0] += 9.0
            advance(1)
    # Lines come 20 s apart at least, and not when all is done.
    assert capsys.readouterr().err.splitlines() == [
        "    timing candidates: 3 of 10, about 63 s left",
        "    timing candidates: 6 of 10, about 36 s left",
        "    timing candidates: 9 of 10, about 9 s left",
    ]


@pytest.mark.parametrize(("total", "shown"), [(10, False), (1, True)])
def test_nothing_is_said_when_quiet_or_of_one_thing(
    clock: list[float], capsys: pytest.CaptureFixture[str], total: int, shown: bool
) -> None:
    with progressing("timing candidates", total, shown) as advance:
        clock[0] += 60.0
        advance(0 if total == 1 else 5)
    assert capsys.readouterr().err == ""


def test_at_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    with progressing("timing candidates", 4, shown=True) as advance:
        advance(3)
    said = capsys.readouterr().err
    assert "timing candidates" in said
    assert "3/4" in said
