"""Ranges against brute force on the values themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersenet.numerics.ranges import Histogram, affine, mse_range, percentile_range, weight_scales
from tersenet.numerics.rounding import fake_quantize, grid


def values(kind: str) -> Tensor:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(50_000, generator=g)
    if kind == "relu":
        return x.relu()
    if kind == "tails":
        return x * torch.rand(50_000, generator=g).reciprocal().clamp(max=50)
    return {"normal": x, "shifted": x + 3, "below": -x.abs(), "far": x + 100}[kind]


def squared_error(x: Tensor, low: float, high: float, bits: int) -> float:
    scale, zero_point = affine(low, high, bits)
    return float((fake_quantize(x, torch.tensor(scale), zero_point, *grid(bits, False)) - x).square().sum())


def histogram_of(x: Tensor) -> Histogram:
    histogram = Histogram(float(x.min()), float(x.max()))
    for part in x.split(7000):
        histogram.add(part)
    assert int(histogram.counts.sum()) == len(x)
    return histogram


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "relu", "tails", "shifted", "below", "far"])
def test_mse_is_never_worse_than_min_max(kind: str, bits: int) -> None:
    x = values(kind)
    full = squared_error(x, float(x.min()), float(x.max()), bits)
    found = squared_error(x, *mse_range(histogram_of(x), bits), bits)
    assert found <= full * 1.01  # a histogram knows its values to 1/2048 of the range
    if kind in ("tails", "normal") and bits < 8:
        assert found < 0.8 * full


def test_mse_is_near_the_best_of_a_fine_search() -> None:
    x = values("relu")
    top = float(x.max())
    best = min(squared_error(x, 0.0, top * share / 200, 4) for share in range(20, 201))
    assert squared_error(x, *mse_range(histogram_of(x), 4), 4) <= 1.02 * best


def test_percentile_leaves_its_share_outside() -> None:
    x = values("normal")
    low, high = percentile_range(histogram_of(x), 99.0)
    assert 0.008 < float((x > high).double().mean()) < 0.0101
    assert 0.008 < float((x < low).double().mean()) < 0.0101
    low, high = percentile_range(histogram_of(x), 100.0)
    assert (low, high) == pytest.approx((float(x.min()), float(x.max())))


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 2.55), (-1.0, 1.0), (-3.0, -1.0), (2.0, 5.0), (-0.001, 7.0), (0.0, 1e-30)]
)
def test_the_grid_covers_the_range_and_holds_zero(low: float, high: float) -> None:
    scale, zero_point = affine(low, high)
    assert 0 <= zero_point <= 255
    assert scale > 0
    assert (0 - zero_point) * scale <= min(low, 0) + scale / 2 * 1.001
    assert (255 - zero_point) * scale >= max(high, 0) - scale / 2 * 1.001


def test_constants_and_nothing() -> None:
    assert affine(0.0, 0.0) == (1.0, 0)
    for constant in (0.0, 3.0, -2.0):
        histogram = Histogram(constant, constant)
        histogram.add(torch.full((100,), constant))
        for low, high in (mse_range(histogram), percentile_range(histogram, 99.9)):
            scale, zero_point = affine(low, high)
            made = fake_quantize(torch.tensor(constant), torch.tensor(scale), zero_point, 0, 255)
            assert float(made) == pytest.approx(constant)


@pytest.mark.parametrize("bits", [3, 8])
def test_weight_scales_never_lose_to_min_max_in_any_channel(bits: int) -> None:
    weight = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0)) ** 3
    low, high = grid(bits, signed=True)

    def error(scale: Tensor) -> Tensor:
        made = fake_quantize(weight, scale[:, None, None, None], 0, low, high)
        return (made - weight).square().sum(dim=(1, 2, 3))

    full = weight_scales(weight, bits, "minmax")
    torch.testing.assert_close(full, weight.abs().amax(dim=(1, 2, 3)) / high)
    assert bool((error(weight_scales(weight, bits)) <= error(full)).all())
    if bits < 8:  # with eight bits, cutting off costs as much as it gains
        assert float(error(weight_scales(weight, bits)).sum()) < 0.95 * float(error(full).sum())


def test_channels_of_zeros_and_of_ones_are_exact() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1e-42, 0.0]])
    scale = weight_scales(weight)
    assert bool((scale > 0).all())
    assert torch.equal(fake_quantize(weight, scale[:, None], 0, -127, 127)[:2], weight[:2])
