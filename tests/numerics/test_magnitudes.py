"""Counted magnitudes against the sorted values themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tersenet.numerics.magnitudes import Magnitudes, equal_marginals


def gathered(values: torch.Tensor) -> Magnitudes:
    """In two parts, as batches come."""
    found = Magnitudes(len(values))
    half = values.shape[1] // 2
    found.add(values[:, :half])
    found.add(values[:, half:])
    return found


@pytest.fixture
def values() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([[1e-3], [1.0], [50.0]])
    return torch.relu(torch.randn(3, 20_000, generator=generator)) * scales


@pytest.mark.parametrize("share", [0.55, 0.7, 0.9, 0.99])
def test_a_threshold_has_the_share_below_it(values: torch.Tensor, share: float) -> None:
    limits = gathered(values).threshold(share)
    assert (values <= limits[:, None]).double().mean(dim=1).tolist() == pytest.approx([share] * 3, abs=2e-3)
    for row, limit in zip(values, limits, strict=True):
        assert float(limit) == pytest.approx(float(np.quantile(row.numpy(), share)), rel=0.02)


def test_where_zeros_are_enough_the_threshold_is_zero(values: torch.Tensor) -> None:
    assert gathered(values).threshold(0.4).tolist() == [0.0, 0.0, 0.0]
    assert gathered(torch.zeros(1, 8)).threshold(1.0).tolist() == [0.0]


def test_shares_and_errors_are_those_of_the_values(values: torch.Tensor) -> None:
    found, limits = gathered(values), torch.tensor([5e-4, 1.0, 20.0], dtype=torch.float64)
    below = values <= limits[:, None]
    assert found.share_below(limits).tolist() == pytest.approx(below.double().mean(dim=1).tolist(), abs=2e-3)
    lost = (values.double().square() * below).sum(dim=1) / values.double().square().sum(dim=1)
    assert found.error_below(limits).tolist() == pytest.approx(lost.tolist(), rel=0.02)
    assert found.mean_square().tolist() == pytest.approx(values.double().square().mean(dim=1).tolist(), rel=0.02)


def test_signs_do_not_matter_and_extremes_are_counted() -> None:
    found = gathered(torch.tensor([[-1.0, 1e-30, 0.0, 1e30]]))
    assert int(found.total) == 4
    assert int(found.zeros) == 1
    assert float(found.share_below(torch.tensor([0.5], dtype=torch.float64))) == 0.5


def test_the_least_squared_error_is_found(values: torch.Tensor) -> None:
    # Brute force: cut the values one by one, in the order of what each costs.
    share, weights = 0.75, [1.0, 5.0, 0.2]
    rows = [gathered(row[None]) for row in values]
    cost = values.double().square() / values.double().square().sum(dim=1, keepdim=True)
    cost = cost * torch.tensor(weights, dtype=torch.float64)[:, None]
    least = cost.flatten().sort().values[: int(share * values.numel())]
    limits = torch.stack([limit[0] for limit in equal_marginals(rows, weights, share)])
    cut = values <= limits[:, None]
    assert float(cut.double().mean()) == pytest.approx(share, abs=2e-3)
    assert float((cost * cut).sum()) == pytest.approx(float(least.sum()), rel=0.02)


def test_natural_zeros_may_be_all_that_is_asked_for(values: torch.Tensor) -> None:
    limits = equal_marginals([gathered(values)], [1.0], 0.3)
    assert not limits[0].any()
