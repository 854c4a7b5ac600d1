"""What a run works with, said before it begins: how images become inputs, and how many samples there are of what."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tersenet.data.classes import listed
from tersenet.preparations import shown
from tersenet.task import Task, inputs_of

_SETS = {"train": "training", "calibrate": "calibration", "validate": "validation", "test": "test"}


def inputs_said(task: Task) -> list[str]:
    """Lines for the terminal: "inputs: ...", "data: ...".

    Images that a Task brings prepared are known by their shape alone.
    """
    preparation, given = task.preparation, inputs_of((task.example, None))
    if [tuple(x.shape[1:]) for x in given] == [(preparation.channels, *preparation.size)]:
        resized = preparation.interpolation + (f", crop {preparation.crop:.4g}" if preparation.crop < 1 else "")
        source = preparation.source or "the task"
        assumed = f"; {', '.join(preparation.assumed)} assumed" if preparation.assumed else ""
        inputs = f"inputs: {shown(preparation)}, {resized} ({source}{assumed})"
    else:
        inputs = "inputs: " + ", ".join("x".join(map(str, x.shape[1:])) for x in given)
    counts = {word: samples(data) for name, word in _SETS.items() if (data := getattr(task, name)) is not None}
    sets = [f"{'some' if count is None else f'{count:,}'} {word} samples" for word, count in counts.items()]
    labels = preparation.labels
    classes = f"; {len(labels)} classes: {listed(labels)}" if labels and task.metric is None else ""
    return [inputs, f"data: {', '.join(sets) or 'none'}{classes}"]


def say_inputs(task: Task) -> None:
    """Prints the lines on standard error, unless the task is quiet."""
    if not task.quiet:
        print("\n".join(inputs_said(task)), file=sys.stderr, flush=True)


def samples(data: Iterable[Any] | None) -> int | None:
    """How many samples a set has; None where it does not tell without being read."""
    if data is None:
        return None
    for owner in (data, getattr(data, "dataset", None)):
        count = getattr(owner, "samples", None)
        if isinstance(count, int):
            return count
    try:
        return len(data.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        return None
