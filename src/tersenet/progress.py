"""How far what takes long has come, with the time that is left: a bar at a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

# Seconds between two lines where nobody looks at a terminal, as in a log or a notebook.
EVERY_S = 20.0


@contextlib.contextmanager
def progressing(said: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Says progress on standard error, told how many more are done. It is said only then: nothing may draw while files
    are timed.

    Args:
        said: what goes on.
        total: how much there is to do; less than 2 shows nothing.
        shown: False where the task is quiet.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not shown or total < 2:
        yield lambda count: None
    elif console.is_terminal:
        with _bar(console, said, total) as advance:
            yield advance
    else:
        yield _Lines(lambda line: console.print(line, soft_wrap=True, markup=False), said, total)


@contextlib.contextmanager
def _bar(console: object, said: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("    {task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, auto_refresh=False, transient=True, speed_estimate_period=600)  # type: ignore[arg-type]
    with bar:
        task = bar.add_task(said, total=total)
        bar.refresh()

        def advance(count: int) -> None:
            bar.advance(task, count)
            bar.refresh()

        yield advance


class _Lines:
    """A line with the time that is left, no sooner than EVERY_S after the one before."""

    def __init__(self, say: Callable[[str], None], said: str, total: int) -> None:
        self.say, self.said, self.total, self.done = say, said, total, 0
        self.started = self.last = time.monotonic()

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last < EVERY_S or self.done >= self.total:
            return
        self.last = now
        left = (now - self.started) / self.done * (self.total - self.done)
        self.say(f"    {self.said}: {self.done} of {self.total}, about {left_text(left)} left")


def left_text(seconds: float) -> str:
    """
    >>> left_text(7.2), left_text(89), left_text(150), left_text(7000)
    ('8 s', '89 s', '3 min', '1 h 57 min')
    """
    if seconds < 90:
        return f"{-int(-seconds // 1)} s"
    minutes = -int(-seconds // 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
