"""Powers of two against a search through all values."""

from __future__ import annotations

import pytest
import torch

from tersenet.numerics.powers_of_two import exponents, round_power, rounded_first


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_the_nearest_of_all_values(bits: int) -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    low, high = exponents(x, bits)
    values = torch.tensor([0.0, *(sign * 2.0**n for n in range(low, high + 1) for sign in (1, -1))])
    assert len(values) == 2 ** (bits - 1) + 1  # 0 and the two signs of 2^(bits-2) powers
    nearest = values[(x[:, None] - values).abs().argmin(dim=1)]
    assert torch.equal(round_power(x, low, high), nearest)


def test_the_paper_s_highest_exponent_is_the_one_nearest_to_the_largest_weight() -> None:
    for largest in (0.76, 1.0, 1.49, 1.51, 3.1):
        _, high = exponents(torch.tensor([0.1, -largest]), 5)
        assert abs(2.0**high - largest) == min(abs(2.0**n - largest) for n in range(-5, 5))


def test_middles_go_up_and_zero_stays() -> None:
    x = torch.tensor([0.75, 1.5, 0.125, 0.0, -0.75])
    assert round_power(x, -2, 1).tolist() == [1.0, 2.0, 0.25, 0.0, -1.0]
    assert exponents(torch.zeros(3), 4) == (0, 0)


def test_the_gradient_passes() -> None:
    x = torch.tensor([0.3, 100.0], requires_grad=True)
    round_power(x, -3, 0).backward(torch.tensor([2.0, 3.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 3.0]


def test_the_largest_come_first_and_none_comes_back() -> None:
    x = torch.tensor([0.1, -0.9, 0.5, -0.3])
    half = rounded_first(x, 0.5)
    assert half.tolist() == [False, True, True, False]
    grown = rounded_first(torch.tensor([0.1, 0.0, 0.0, -0.3]), 0.75, half)
    assert grown.tolist() == [False, True, True, True]
    assert bool(rounded_first(x, 1.0, grown).all())
