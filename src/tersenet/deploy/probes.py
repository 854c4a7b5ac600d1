"""The inputs that a file is compared on: real ones, and made ones that reach what real ones leave at zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tersenet.task import batch_input

Inputs = tuple[Tensor, ...]
# Numbers in all samples together, about; and how many samples there are at least and at most.
_NUMBERS, _FEWEST, _MOST = 300_000, 8, 32


def real_probes(batches: Iterable[Any]) -> list[Inputs]:
    """The real samples that a file is compared on, one by one.

    Args:
        batches: of inputs (N, ...), as in Task.
    """
    chosen: list[Inputs] = []
    wanted = _MOST
    for batch in batches:
        inputs = _inputs(batch)
        numbers = sum(math.prod(x.shape[1:]) for x in inputs)
        wanted = min(_MOST, max(_FEWEST, _NUMBERS // max(1, numbers)))
        chosen += [tuple(x[i : i + 1] for x in inputs) for i in range(len(inputs[0]))][: wanted - len(chosen)]
        if len(chosen) >= wanted:
            break
    return chosen[: max(1, 3 * wanted // 4)]


def probes(real: Sequence[Inputs], seed: int = 0) -> list[Inputs]:
    """One batch of one sample and one of all others: the first of the real ones alone, then more real and made ones.

    Of four samples one is made: noise over the range of the real ones, a real one mirrored in that range, one shifted
    by half of it. Units that no real input wakes are compared there, such as a channel whose ReLU gives zeros only.
    A batch of one is what users run most, and what a size that the file holds fixed shows in.

    Args:
        real: from `real_probes`; integers and booleans are only taken in another order.
        seed: of the made ones.
    """
    if not real:
        return []
    generator = torch.Generator().manual_seed(seed)
    made = [
        tuple(_made(x, torch.cat([each[i] for each in real]), kind % 3, generator) for i, x in enumerate(sample))
        for kind, sample in enumerate(islice(_again(real), max(3, len(real) // 3)))
    ]
    together = [torch.cat(part) for part in zip(*real[1:], *made, strict=True)]
    return [real[0], tuple(together)]


def _inputs(batch: Any) -> Inputs:
    found = batch_input(batch)
    given = tuple(found) if isinstance(found, tuple | list) else (found,)
    return tuple(x.detach().float() if x.is_floating_point() else x.detach() for x in given)


def _again(samples: Sequence[Inputs]) -> Iterable[Inputs]:
    while True:
        yield from reversed(samples)


def _made(x: Tensor, real: Tensor, kind: int, generator: torch.Generator) -> Tensor:
    """One made sample (1, ...) after a real one."""
    if not x.is_floating_point():
        return x
    low, high = real.min(), real.max()
    if kind == 0:
        return low + (high - low) * torch.rand(x.shape, generator=generator).to(x)
    if kind == 1:
        return low + high - x
    return x + (high - low) / 2
