"""Batches in a training: where they come from, how processes share them, what is checked about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tersenet.errors import DataError
from tersenet.task import INPUT_KEYS, Task, batch_target
from tersenet.train.invariances import suited

if TYPE_CHECKING:
    from tersenet.train.train import Train


def training_data(settings: Train, task: Task) -> Iterable[Any]:
    """The batches to train on. Raises DataError, saying what can be done without labels."""
    unlabelled = task.calibrate if settings.label_weight == 0 else None
    data = task.train if task.train is not None else unlabelled
    if data is not None:
        return suited(data, task) if settings.augment == "auto" else _augmented(data, settings.augment)
    raise DataError(
        "there is no training data (task.train is None); without labels, distillation still works (train with "
        "label_weight: 0 and soft_targets, on unlabelled calibrate data), and so do the steps that do not train"
    )


def _augmented(data: Any, augment: str) -> Iterable[Any]:
    """The same images, changed otherwise. Raises DataError on data of the caller's own making."""
    like = getattr(data, "like", None)
    if like is None:
        raise DataError(
            f"augment is {augment!r}, but the training data ({type(data).__name__}) is not tersenet's; leave augment "
            "out, and change the images where the data is made"
        )
    found: Iterable[Any] = like(augment=None if augment == "none" else augment)
    return found


def count_batches(data: Iterable[Any]) -> int:
    """Batches per epoch; data without a length is read once to count them. Raises DataError on none."""
    try:
        count = len(data)  # type: ignore[arg-type]
    except TypeError:
        if isinstance(data, Iterator):
            raise DataError(
                f"the training data can be read only once ({type(data).__name__}); give a list, a DataLoader, or "
                "an object whose __iter__ starts anew"
            ) from None
        count = sum(1 for _ in data)
    if count == 0:
        raise DataError("the training data is empty (0 batches); give at least one batch")
    return count


def split(batch: Any, samples: int, rank: int, world: int) -> tuple[Any, float]:
    """One process's samples of a batch, and the weight of its loss.

    Process r of R takes samples r, r + R, ... (n of N). DDP averages gradients over processes, so the weight n R / N
    makes the average that of the whole batch. A process without samples gets the first with weight 0, because its
    gradients are waited for.
    """
    own = slice(rank, None, world) if rank < samples else slice(0, 1)
    count = len(range(rank, samples, world))

    heads = [batch.get(key) for key in INPUT_KEYS] if isinstance(batch, dict) else batch[:1]

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[own] if value.ndim and len(value) == samples else value
        if isinstance(value, dict):
            return {key: part(item) for key, item in value.items()}
        # Of two samples, a list of two inputs is no list of samples; one dictionary of boxes for each image is.
        whole = value is batch or any(value is head for head in heads)
        if isinstance(value, list) and not whole and len(value) == samples:
            return value[own]
        if isinstance(value, tuple | list):
            return type(value)(part(item) for item in value)
        return value

    return part(batch), count * world / samples


def check_labels(outputs: Any, batch: Any) -> None:
    """Raises DataError on class labels that the outputs, (N, classes, ...), have no class for."""
    target = batch_target(batch)
    if (
        not isinstance(outputs, Tensor)
        or target.is_floating_point()
        or target.ndim != outputs.ndim - 1
        or not target.numel()
    ):
        return
    classes = outputs.shape[1]
    target = target[target != -100]  # what cross_entropy leaves out
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < classes:
        raise DataError(
            f"labels run from {int(target.min())} to {int(target.max())}, but the model has {classes} classes "
            f"(0 to {classes - 1}); check the label column"
        )


def samples_of(batch: Any) -> int:
    """The length of the first tensor in a batch."""
    if isinstance(batch, Tensor):
        return len(batch)
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else ()
    return next((found for found in map(samples_of, values) if found), 0)


def channels_last(batch: Any) -> Any:
    """(N, C, H, W) tensors as N H W C in memory."""
    if isinstance(batch, Tensor):
        return batch.contiguous(memory_format=torch.channels_last) if batch.ndim == 4 else batch
    if isinstance(batch, dict):
        return {key: channels_last(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(channels_last(value) for value in batch)
    return batch
