"""The range of least divergence against a plain loop, and on distributions whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tersenet.numerics.ranges import Histogram, affine, divergence_range, mse_range


def histogram(x: Tensor, bins: int = 2048) -> Histogram:
    made = Histogram(min(float(x.min()), 0.0), float(x.max()), bins)
    made.add(x)
    return made


def divergence(counts: list[float], kept: int, steps: int) -> float:
    """One-sided, as in the talk: `kept` bins and the rest in the last of them; as many bins in each step."""
    p = [*counts[: kept - 1], sum(counts[kept - 1 :])]
    q = [0.0] * kept
    for step in range(steps):
        # The nearest of `steps` values from 0 to the end of the range.
        own = [i for i in range(kept) if min(round((i + 0.5) / kept * (steps - 1)), steps - 1) == step]
        support = [i for i in own if p[i] > 0]
        for i in support:
            q[i] = sum(counts[j] for j in own) / len(support)
    support = [i for i in range(kept) if p[i] > 0]
    q = [0.999 * value / sum(q) + 0.001 * (i in support) / len(support) for i, value in enumerate(q)]
    return sum(p[i] / sum(p) * math.log(p[i] / sum(p) / q[i]) for i in support)


@pytest.mark.parametrize("bits", [2, 4])
def test_no_number_of_bins_has_less_divergence(bits: int) -> None:
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0)).abs() ** 1.5
    made = histogram(x, bins=128)
    counts = made.counts.double()
    counts[0] = min(counts[0], counts[1])
    fewest = 2**bits
    _, high = divergence_range(made, bits, candidates=128 - fewest + 1)
    kept = round(high / made.high * 128)
    found = [divergence(counts.tolist(), n, 2**bits) for n in range(fewest, 129)]
    assert found[kept - fewest] == pytest.approx(min(found), rel=1e-6)
    assert min(found) < 0.9 * found[-1]


def test_a_value_far_outside_is_cut_off() -> None:
    x = torch.randn(100000, generator=torch.Generator().manual_seed(0)).abs()
    x[0] = 60.0
    low, high = divergence_range(histogram(x))
    assert low == 0.0
    assert 2.5 < high < 10.0  # one eighth of 60 is the least that may be kept


def test_two_sides_are_cut_on_their_own() -> None:
    x = torch.randn(100000, generator=torch.Generator().manual_seed(0))
    x[0] = 40.0
    low, high = divergence_range(histogram(x))
    assert -5.0 <= low < -2.5
    assert 2.5 < high < 12.0


def test_even_values_keep_their_range() -> None:
    x = torch.rand(100000, generator=torch.Generator().manual_seed(0))
    low, high = divergence_range(histogram(x))
    assert low == 0.0
    assert high > 0.97


def test_a_heap_of_zeros_changes_nothing() -> None:
    x = torch.randn(50000, generator=torch.Generator().manual_seed(0)).abs() * 3
    with_zeros = torch.cat([x, torch.zeros(200000)])
    assert divergence_range(histogram(with_zeros), 4) == pytest.approx(divergence_range(histogram(x), 4), rel=0.02)


def test_constants_and_nothing() -> None:
    for constant in (0.0, 3.0, -2.0):
        made = Histogram(constant, constant)
        made.add(torch.full((100,), constant))
        low, high = divergence_range(made)
        assert (low, high) == (min(constant, 0.0), max(constant, 0.0))
        assert affine(low, high)[0] > 0
    assert divergence_range(Histogram(0.0, 1.0)) == (0.0, 1.0)


def test_at_two_bits_the_squared_error_finds_small_ranges() -> None:
    x = torch.randn(100000, generator=torch.Generator().manual_seed(0)).abs()
    x[0] = 25.0
    _, high = mse_range(histogram(x), bits=2)
    grids = torch.linspace(0.5, 8, 500)[:, None] / 3
    few = x[:5000]
    errors = (torch.clamp(torch.round(few / grids), 0, 3) * grids - few).square().sum(dim=1)
    assert high == pytest.approx(3 * float(grids[errors.argmin()]), rel=0.08)
