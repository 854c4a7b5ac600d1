"""The inputs of a model side by side, one or several: (N, ...) each, with the same samples in the same order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Inputs = Tensor | tuple[Tensor, ...]  # what a model is called with: one input, or all of them by order


def side_by_side(inputs: Inputs) -> tuple[Tensor, ...]:
    """All inputs by order, also where there is one."""
    return inputs if isinstance(inputs, tuple) else (inputs,)


def first(inputs: Inputs, count: int) -> tuple[Tensor, ...]:
    """The first samples, at most `count`."""
    return tuple(each[:count] for each in side_by_side(inputs))


def in_parts(inputs: Inputs, size: int) -> Iterator[tuple[Tensor, ...]]:
    """At most `size` samples at a time."""
    return zip(*(each.split(size) for each in side_by_side(inputs)), strict=True)


def together(batches: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Batches one behind the other."""
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def as_batch(inputs: Inputs) -> tuple[Inputs, None]:
    """What a task takes for a batch of these samples, without targets."""
    every = side_by_side(inputs)
    return (every[0] if len(every) == 1 else every, None)
