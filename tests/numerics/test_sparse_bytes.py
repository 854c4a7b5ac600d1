"""Sizes of coded zeros against encoders written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tersenet.numerics.sparse_bytes import bitmap, bound, dense, distances, entropy_bits


def there(text: str) -> torch.Tensor:
    return torch.tensor([letter == "1" for letter in text])


def test_dense_and_bitmap() -> None:
    assert dense(10, 32) == 40
    assert dense(3, 4) == 2
    assert bitmap(there("10010000"), stored=2, bits=8) == 3  # 8 bits of map, 2 bytes
    assert bitmap(there("1001"), stored=32, bits=8) == 33  # blocks of 16


@pytest.mark.parametrize("index", [1, 2, 4])
def test_distances_are_those_of_an_encoder(index: int) -> None:
    mask = torch.rand(500, generator=torch.Generator().manual_seed(0)) < 0.1
    entries, gap = 0, 0
    for present in mask.tolist():
        gap += 1
        if present or gap == 2**index:
            entries += 1
            gap = 0
    # Fillers behind the last weight are not needed.
    last = int(mask.nonzero()[-1])
    entries -= (len(mask) - 1 - last) // 2**index
    assert distances(mask, int(mask.sum()), 8, index) == math.ceil(entries * (8 + index) / 8)


def test_the_paper_s_example() -> None:
    """Deep compression, figure 2: weights at 1, 4 and 15 with 3-bit distances need one filler."""
    mask = torch.zeros(16, dtype=torch.bool)
    mask[[1, 4, 15]] = True
    assert distances(mask, 3, 32, 3) == math.ceil(4 * 35 / 8)


def test_no_weights_cost_nothing() -> None:
    assert distances(there("0000"), 0, 8, 4) == 0
    assert bound(there("0000"), torch.zeros(0)) == 0


def test_entropy() -> None:
    assert entropy_bits(torch.tensor([0, 1, 2, 3])) == pytest.approx(8.0)
    assert entropy_bits(torch.tensor([5, 5, 5])) == 0.0
    assert bound(there("1100"), torch.tensor([3, 4])) == math.ceil((4 + 2) / 8)
