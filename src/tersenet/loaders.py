"""From what a user has at hand (a DataLoader, a Dataset, batches, a tensor) to the Task of a step that runs alone.

A fixed number of samples is read once and kept, so that a loader that shuffles or augments gives every pass the same
inputs and a generator can be given too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from tersenet.bricks.evaluating import evaluating
from tersenet.bricks.opened import unwrapped
from tersenet.errors import DataError
from tersenet.sources import input_names
from tersenet.task import Task, batch_target, inputs_of, samples_in

_BATCH = 32  # of what comes in samples


def task_of(model: nn.Module, loader: Any, samples: int, quiet: bool = False) -> Task:
    """The task of a model on inputs at hand, for a step that reads about `samples` of them.

    Class labels serve steps and scores that want them; other targets are left aside.

    Args:
        model: is asked once whether it takes these inputs, in evaluation mode, and left as it was.
        loader: a DataLoader or any other iterable of batches, each an input (N, ...), an (input, target) pair or a
            dict, several inputs as a tuple in their place; a Dataset, of whose samples some are taken at equal
            distances; one tensor (N, ...); or a Task, which is taken as it is.
    Raises:
        DataError: when there are no such batches, or the model does not take them.
    """
    if isinstance(loader, Task):
        return dataclasses.replace(loader, quiet=quiet or loader.quiet)
    batches = list(_batches(loader, samples))
    if not batches:
        raise DataError("the loader is empty (0 batches); give at least one batch")
    example = tuple((x if len(x) > 1 else torch.cat([x, x]))[:2].clone() for x in inputs_of(batches[0]))
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    inputs = tuple(x.to(device) for x in example)
    _check_runs(model, inputs)
    labelled = all(class_labels(batch) is not None for batch in batches)
    return Task(
        example=inputs if len(inputs) > 1 else inputs[0],  # type: ignore[arg-type]
        train=batches if labelled else None,
        calibrate=batches,
        quiet=quiet,
    )


def class_labels(batch: Any) -> Tensor | None:
    """The class numbers of a batch, (N,) integers; None where its targets are something else, or there are none."""
    try:
        target = batch_target(batch)
    except DataError:
        return None
    whole = isinstance(target, Tensor) and target.dim() == 1 and not target.is_floating_point()
    return target if whole and len(target) == samples_in(batch) else None


def _batches(loader: Any, samples: int) -> Iterator[Any]:
    """The first batches, about `samples` samples in all, each of which has inputs."""
    seen = 0
    for number, batch in enumerate(_iterated(loader, samples)):
        _check_batch(batch, number)
        yield batch
        seen += samples_in(batch)
        if seen >= samples:
            return


def _iterated(loader: Any, samples: int) -> Iterable[Any]:
    if isinstance(loader, Tensor):
        return loader.split(_BATCH)
    if isinstance(loader, Dataset):
        return _collated(loader, samples)
    if isinstance(loader, str | bytes | dict) or not isinstance(loader, Iterable):
        named = f"{loader!r}" if isinstance(loader, str) else f"of type {type(loader).__name__}"
        raise DataError(
            f"the loader is {named}; give a DataLoader, a Dataset, a tensor (N, ...) or any iterable of batches (data "
            "by name or folder is opened by tersenet.open_task)"
        )
    return loader


def _collated(dataset: Dataset[Any], samples: int) -> Iterator[Any]:
    """Batches of a data set's samples: some at equal distances, since the first of a sorted one are of one class."""
    kind, count = type(dataset).__name__, len(dataset) if hasattr(dataset, "__len__") else None
    if count is not None and count > samples:
        dataset = Subset(dataset, [i * count // samples for i in range(samples)])
    try:
        yield from DataLoader(dataset, batch_size=_BATCH)
    except (TypeError, RuntimeError) as error:
        raise DataError(
            f"the samples of the {kind} make no batch ({str(error).splitlines()[0]}); let it give "
            "tensors of one shape, such as with transforms.ToTensor(), or give a DataLoader with a collate_fn"
        ) from error


def _check_batch(batch: Any, number: int) -> None:
    inputs = inputs_of(batch)
    for x in inputs:
        if not isinstance(x, Tensor) or x.dim() == 0:
            kind = "number" if isinstance(x, Tensor) else type(x).__name__
            raise DataError(
                f"batch {number} of the loader holds an input of type {kind}; give tensors (N, ...), alone, in an "
                "(input, target) pair or in a dict"
            )
    if len({len(x) for x in inputs}) != 1 or not len(inputs[0]):
        sizes = ", ".join(str(len(x)) for x in inputs)
        raise DataError(f"batch {number} of the loader has inputs of {sizes} samples; give as many of each, at least 1")


def _check_runs(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Raises DataError where the model does not take the inputs, in the words of what failed."""
    model = unwrapped(model)
    try:
        with evaluating(model), torch.inference_mode():
            model(*inputs)
    except Exception as error:
        shapes = " and ".join(f"{tuple(x.shape)} of {str(x.dtype).removeprefix('torch.')}" for x in inputs)
        names = input_names(model)
        several = ""
        if len(names) > len(inputs):
            several = f" (it takes {len(names)} inputs, {', '.join(names)}: give each batch as ((a, b), target))"
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"the model does not take the loader's inputs, {shapes}{several}: {said[0]}; give batches (N, ...) as "
            "in its training"
        ) from error
