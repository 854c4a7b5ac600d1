"""Chance that can be repeated: every batch draws from a seed of its own, so a training can start in its middle.

Were there one stream of random numbers, its state would have to be kept for every source of chance (torch, its
devices, NumPy, Python, loader workers). A seed from (task's seed, epoch, batch, process) needs nothing kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from tersenet.task import Resumable, batches_at

_END = object()


def reseed(device: torch.device, *numbers: int | str) -> None:
    """Seeds torch, the device, NumPy and Python from some numbers. About 20 us on the CPU."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1  # torch takes 63 bits
    # torch.manual_seed would also queue the seed, with a stack trace, for every accelerator that is not in use.
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


@contextlib.contextmanager
def chance_kept(device: torch.device) -> Iterator[None]:
    """Puts the global random states back at the end, so that training leaves no trace in them."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_device = getattr(torch, device.type).get_rng_state() if device.type != "cpu" else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if on_device is not None:
            getattr(torch, device.type).set_rng_state(on_device)


def seeded_batches(
    data: Iterable[Any], epoch: int, start: int, seed: int, device: torch.device
) -> Iterator[tuple[int, Any]]:
    """(index, batch) of one epoch from batch `start` on, each drawn under its own seed.

    Data that cannot start anywhere is read from its beginning under the same seeds, so that shuffling and
    augmentation give what they gave the first time.
    """
    first = start if isinstance(data, Resumable) else 0
    reseed(device, seed, epoch, "order")
    source = batches_at(data, epoch, first)
    for index in itertools.count(first):
        reseed(device, seed, epoch, index, "data")
        batch = next(source, _END)
        if batch is _END:
            return
        if index >= start:
            yield index, batch
