"""What a run works with, said before it begins: how images become inputs, how many samples there are of what, and
whether the model can do anything with them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tersenet.bricks.evaluating import evaluating
from tersenet.data.classes import listed
from tersenet.preparations import shown
from tersenet.task import Score, Task, inputs_of

_SETS = {"train": "training", "calibrate": "calibration", "validate": "validation", "test": "test"}


def inputs_said(task: Task) -> list[str]:
    """Lines for the terminal: "inputs: ...", "data: ...".

    Images that a Task brings prepared are known by their shape alone.
    """
    preparation, given = task.preparation, inputs_of((task.example, None))
    if preparation.is_of_data:
        inputs = "inputs: " + "x".join(map(str, given[0].shape[1:])) + ", prepared by the task"
    elif [tuple(x.shape[1:]) for x in given] == [(preparation.channels, *preparation.size)]:
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


def near_chance(score: Score | None, model: nn.Module, task: Task) -> str | None:
    """That a model does not tell the classes apart, where the score's interval holds what guessing would score.

    Args:
        score: the model's accuracy; None where it was not scored.
    """
    if task.metric is not None or score is None or score.low is None:
        return None
    classes = len(task.preparation.labels) or _outputs(model, task)
    if classes < 2 or score.low > 1 / classes:
        return None
    return (
        f"WARNING: THE ORIGINAL SCORES NO BETTER THAN GUESSING: {100 * score.value:.1f} %, and guessing among "
        f"{classes} classes scores {100 / classes:.1f} %; check its weights, how its inputs are prepared (--mean, "
        "--std, --image-size) and the order of its classes before anything is made of these figures"
    )


def _outputs(model: nn.Module, task: Task) -> int:
    """The number of class scores, where the task names no classes."""
    with evaluating(model), torch.inference_mode():
        return int(task.forward(model, (task.example, None)).shape[-1])
