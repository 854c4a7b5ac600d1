"""Training images as no training sees them: augmented as in an epoch that none reaches."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersenet.numerics.intervals import wilson
from tersenet.task import batches_at, samples_in

_UNSEEN_EPOCH = 1_000_003


def unseen_batches(data: Iterable[Any], samples: int, seed: int) -> Iterator[Any]:
    """The first batches of such an epoch, about so many samples in all; the same ones at each call, from a loader that
    shuffles or augments by chance, too, whose own chance is left as it was."""
    found, seen = [], 0
    with _seeded(data, seed):
        for batch in batches_at(data, _UNSEEN_EPOCH):
            found.append(batch)
            seen += samples_in(batch)
            if seen >= samples:
                break
    return iter(found)


def knows_classes(right: int, images: int, targets: Tensor) -> bool:
    """Whether so many right answers of `images` show that a model tells the classes apart, by more than a little.

    Args:
        targets: (N,) class numbers of such images: always saying the most frequent one is right as often as it is.
    """
    counts = targets.bincount()
    guessing = float(counts.max() / counts.sum())
    return wilson(right, images, z=3.0)[0] > min(1.5 * guessing, (1 + guessing) / 2)


@contextlib.contextmanager
def _seeded(data: Any, seed: int) -> Iterator[None]:
    owners = (data, getattr(data, "sampler", None), getattr(getattr(data, "batch_sampler", None), "sampler", None))
    own = {id(each): each for owner in owners if isinstance(each := getattr(owner, "generator", None), torch.Generator)}
    generators = [torch.default_generator, *own.values()]
    states = [generator.get_state() for generator in generators]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        for generator in generators:
            generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(python)
        np.random.set_state(numpy)
