"""Training images as no training sees them: augmented as in an epoch that none reaches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from tersenet.task import batches_at, samples_in

_UNSEEN_EPOCH = 1_000_003


def unseen_batches(data: Iterable[Any], samples: int, seed: int) -> Iterator[Any]:
    """The first batches of such an epoch, about so many samples in all; the same ones at each call, from a loader that
    shuffles, too."""
    found, seen = [], 0
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for batch in batches_at(data, _UNSEEN_EPOCH):
            found.append(batch)
            seen += samples_in(batch)
            if seen >= samples:
                break
    return iter(found)
