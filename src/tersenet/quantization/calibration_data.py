"""What makes calibration data unfit to learn ranges from, although every value in them is allowed."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from tersenet.errors import DataError, InputWarning
from tersenet.findings import tell
from tersenet.task import Task, batch_target, inputs_of


def warn_of_calibration(task: Task, samples: int) -> None:
    """Warns, and tells the report, of calibration data that are plain, a single image, or of one class.

    Raises:
        DataError: as `Task.calibration`.
    """
    if (said := unfit(task, samples)) is not None:
        tell([said], quiet=True)
        warnings.warn(said, InputWarning, stacklevel=3)


def unfit(task: Task, samples: int) -> str | None:
    """What is wrong with the first `samples` of the calibration data, in one sentence; None where nothing is."""
    count, plain, same = 0, True, True
    first: tuple[Tensor, ...] = ()
    classes: set[int] = set()
    for batch in task.calibration(samples):
        inputs = inputs_of(batch)
        first = first or tuple(x[:1] for x in inputs)
        count += len(inputs[0])
        plain = plain and all(x.dim() == 4 and bool((x == x[..., :1, :1]).all()) for x in inputs)
        same = same and all(
            x.shape[1:] == one.shape[1:] and bool((x == one).all()) for x, one in zip(inputs, first, strict=False)
        )
        classes |= _classes(batch)
    labels = task.preparation.labels
    if plain:
        images = f"all {count} calibration images are" if count > 1 else "the calibration image is"
        return (
            f"{images} of one plain color, from which no ranges of activations can be learnt; give images like those "
            "that the model will see"
        )
    if same:
        samples_ = f"all {count} calibration samples are the same one" if count > 1 else "there is 1 calibration sample"
        return f"{samples_}, so that the ranges of activations are those of it alone; give some hundred that differ"
    if len(classes) == 1 and len(labels) > 1:  # without names, labels may be there for their number alone
        (number,) = classes
        name = labels[number] if 0 <= number < len(labels) else str(number)
        return (
            f"all {count} calibration samples are of one class ({name}), so that the ranges of activations are those "
            "of this class alone; give some of every class, such as by shuffling them"
        )
    return None


def _classes(batch: Any) -> set[int]:
    """The class numbers of a batch; none where it has no labels of this kind."""
    try:
        target = batch_target(batch)
    except DataError:
        return set()
    if not isinstance(target, Tensor) or target.is_floating_point() or target.dim() != 1:
        return set()
    return set(target.unique().tolist())
