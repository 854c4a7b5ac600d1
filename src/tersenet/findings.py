"""What a step found wrong with what it made, in sentences: printed at once, and kept for the report of a run.

Whoever runs steps collects. What a step only tries finds nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_COLLECTED: ContextVar[list[str] | None] = ContextVar("findings of steps", default=None)


@contextlib.contextmanager
def collecting() -> Iterator[list[str]]:
    """The findings of all steps that run while it is open, in order."""
    found: list[str] = []
    token = _COLLECTED.set(found)
    try:
        yield found
    finally:
        _COLLECTED.reset(token)


@contextlib.contextmanager
def unasked() -> Iterator[None]:
    """Nobody collects while it is open."""
    token = _COLLECTED.set(None)
    try:
        yield
    finally:
        _COLLECTED.reset(token)


def is_asked(quiet: bool) -> bool:
    """Whether anybody will see what is found, so that it is worth looking for."""
    return not quiet or _COLLECTED.get() is not None


def tell(sentences: list[str], quiet: bool) -> None:
    """Gives sentences to whoever collects, and prints them on standard error unless `quiet`."""
    collected = _COLLECTED.get()
    if collected is not None:
        collected += sentences
    if sentences and not quiet:
        from rich.console import Console

        console = Console(stderr=True, highlight=False, markup=False)
        for sentence in sentences:
            console.print(f"    {sentence}", soft_wrap=True)
