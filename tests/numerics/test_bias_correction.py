"""Shifts of the mean against layers that run, and the clipped normal against samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tersenet.numerics.bias_correction import clipped_normal_mean, measured_shift, output_shift


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_shift_is_that_of_the_layer(groups: int) -> None:
    source = torch.Generator().manual_seed(0)
    x = torch.rand(3, 4, 9, 9, generator=source)
    x = x - x.mean(dim=(0, 2, 3), keepdim=True) * 0 + torch.arange(4.0).view(1, 4, 1, 1)
    weight, change = (torch.randn(8, 4 // groups, 3, 3, generator=source) for _ in range(2))
    # Constant channels, so that every place has the mean: no borders.
    flat = x.mean(dim=(0, 2, 3), keepdim=True).expand_as(x)
    wanted, found = (F.conv2d(flat, part, groups=groups) for part in (weight, weight + 0.01 * change))
    shift = output_shift(0.01 * change, flat[0, :, 0, 0], groups)
    torch.testing.assert_close(shift, measured_shift(wanted, found), rtol=1e-3, atol=1e-5)


def test_of_a_linear_layer() -> None:
    x, change = torch.randn(50, 6) + 2, torch.randn(3, 6)
    torch.testing.assert_close(output_shift(change, x.mean(0)), (x @ change.T).mean(0))
    torch.testing.assert_close(measured_shift(torch.zeros(50, 3), x @ change.T), (x @ change.T).mean(0))


@pytest.mark.parametrize(("low", "high"), [(0.0, math.inf), (0.0, 6.0), (-math.inf, 1.0), (-math.inf, math.inf)])
def test_the_clipped_normal(low: float, high: float) -> None:
    mean, deviation = torch.tensor([-2.0, 0.0, 0.5, 5.0]), torch.tensor([1.0, 1.0, -2.0, 3.0])
    grid = torch.linspace(-10, 10, 200001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi)
    values = (mean.double()[:, None] + deviation.double().abs()[:, None] * grid).clamp(low, high)
    expected = torch.trapezoid(values * density, grid)
    torch.testing.assert_close(clipped_normal_mean(mean, deviation, low, high).double(), expected, rtol=1e-5, atol=1e-6)


def test_constants() -> None:
    found = clipped_normal_mean(torch.tensor([-1.0, 3.0, 9.0, 0.0]), torch.zeros(4), 0.0, 6.0)
    assert found.tolist() == [0.0, 3.0, 6.0, 0.0]
