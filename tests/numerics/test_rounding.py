"""Rounding against its formula, one number at a time, and its gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersenet.numerics.rounding import dequantize, fake_quantize, grid, quantize


def one(x: float, scale: float, zero_point: int, low: int, high: int) -> float:
    """The formula in plain Python; round() there is half to even as well."""
    return (min(max(round(x / scale) + zero_point, low), high) - zero_point) * scale


@given(
    x=st.floats(-100, 100, width=32),
    power=st.integers(-6, 3),
    bits=st.integers(2, 8),
    zero=st.integers(0, 255),
    signed=st.booleans(),
)
def test_the_formula(x: float, power: int, bits: int, zero: int, signed: bool) -> None:
    low, high = grid(bits, signed)
    zero, scale = (0 if signed else zero % (high + 1)), 2.0**power  # powers of two divide exactly in both
    made = fake_quantize(torch.tensor(x), torch.tensor(scale), zero, low, high)
    assert float(made) == one(x, scale, zero, low, high)
    q = quantize(torch.tensor(x), torch.tensor(scale), zero, low, high)
    assert low <= float(q) <= high
    assert float(q) == int(q)
    assert float(dequantize(q, torch.tensor(scale), zero)) == float(made)


def test_agrees_with_torch() -> None:
    x, scale = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0.01, 0.02, 0.03, 0.5])
    torch.testing.assert_close(
        fake_quantize(x, scale[:, None], 0, -127, 127),
        torch.fake_quantize_per_channel_affine(x, scale, torch.zeros(4, dtype=torch.int32), 0, -127, 127),
    )


@pytest.mark.parametrize("zero_point", [0, 10])
def test_the_gradient_is_one_inside_and_zero_outside(zero_point: int) -> None:
    x = torch.tensor([-3.0, -1.04, 0.0, 0.3, 24.5, 25.54, 25.6, 30.0], requires_grad=True)
    y = fake_quantize(x, torch.tensor(0.1), zero_point, 0, 255)
    y.backward(torch.arange(1.0, 9.0))
    steps = torch.round(x.detach() / 0.1) + zero_point
    inside = (steps >= 0) & (steps <= 255)
    assert 0 < int(inside.sum()) < 8
    assert x.grad is not None
    assert torch.equal(x.grad, torch.arange(1.0, 9.0) * inside)


def test_with_and_without_gradient_the_values_are_equal() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(0.0137)
    assert torch.equal(fake_quantize(x, scale, 7, 0, 255), fake_quantize(x.clone().requires_grad_(), scale, 7, 0, 255))


def test_rounding_twice_changes_nothing() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    once = fake_quantize(x, torch.tensor(0.0137), 100, 0, 255)
    assert torch.equal(fake_quantize(once, torch.tensor(0.0137), 100, 0, 255), once)


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_outside_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"got {bits}"):
        grid(bits, signed=True)
