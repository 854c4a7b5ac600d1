"""Every batch has a seed of its own."""

from __future__ import annotations

import random

import numpy as np
import torch

from tersenet.train.chance import reseed, seeded_batches

CPU = torch.device("cpu")


class Drawing:
    """Batches that are nothing but chance, from all three sources."""

    def __iter__(self):  # type: ignore[no-untyped-def]
        order = torch.randperm(100)
        for i in range(6):
            yield int(order[i]), float(torch.rand(())), float(np.random.rand()), random.random()


def read(start: int, seed: int = 0, epoch: int = 0) -> list[tuple[int, object]]:
    found = []
    for item in seeded_batches(Drawing(), epoch, start, seed, CPU):
        found.append(item)
        torch.rand(random.randrange(5))  # a training draws too, and differs in how much
    return found


def test_a_later_start_gives_the_same_batches() -> None:
    whole = read(0)
    assert [index for index, _ in whole] == [0, 1, 2, 3, 4, 5]
    for start in range(7):
        assert read(start) == whole[start:]


def test_epochs_seeds_and_batches_differ() -> None:
    draws = [item for seed in (0, 1) for epoch in (0, 1) for _, item in read(0, seed, epoch)]
    assert len({item[1:] for item in draws}) == 24  # type: ignore[index]
    reseed(CPU, 1, 23)
    first = torch.rand(())
    reseed(CPU, 12, 3)
    assert torch.rand(()) != first
