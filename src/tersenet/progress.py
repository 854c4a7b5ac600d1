"""A bar for what takes long, with the time that is left; only where somebody looks at a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progressing(said: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, told how many more are done. It is drawn only then: nothing may draw while files are
    timed.

    Args:
        said: what goes on.
        total: how much there is to do; less than 2 shows nothing.
        shown: False where the task is quiet.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not shown or total < 2 or not console.is_terminal:
        yield lambda count: None
        return
    columns = (TextColumn("    {task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, auto_refresh=False, transient=True, speed_estimate_period=600)
    with bar:
        task = bar.add_task(said, total=total)
        bar.refresh()

        def advance(count: int) -> None:
            bar.advance(task, count)
            bar.refresh()

        yield advance
