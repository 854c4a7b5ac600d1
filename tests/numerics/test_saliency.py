from __future__ import annotations

import numpy as np
import pytest
import torch

from tersenet.numerics.compensation import least_squares
from tersenet.numerics.saliency import chance, class_magnitude, magnitude


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dim", [0, 1, 3])
def test_magnitude_is_a_sum_over_a_slice(dim: int, power: int) -> None:
    weight = torch.randn(4, 3, 2, 5)
    expected = [
        sum(abs(v) ** power for v in weight.select(dim, i).flatten().tolist()) for i in range(weight.shape[dim])
    ]
    torch.testing.assert_close(magnitude(weight, dim, power), torch.tensor(expected, dtype=torch.float64))


def test_magnitude_of_a_vector() -> None:
    assert magnitude(torch.tensor([1.0, -3.0]), 0, 2).tolist() == [1.0, 9.0]


def test_layers_count_alike_whatever_their_size() -> None:
    small, large = np.array([1.0, 3.0]), np.array([3000.0, 1000.0])
    both = class_magnitude([(small, np.array([0, 1])), (large, np.array([0, 1]))], 2, power=1)
    assert both.tolist() == [2.0, 2.0]
    # a channel that owns several positions of a layer has their sum
    spread = class_magnitude([(np.array([1.0, 1.0, 2.0, 4.0]), np.array([0, 0, 1, 1]))], 3, power=2)
    np.testing.assert_allclose(spread, [np.sqrt(0.5), np.sqrt(1.5), 0.0])
    assert class_magnitude([], 2, power=2).tolist() == [0.0, 0.0]


def test_chance_is_repeatable() -> None:
    assert (chance(5, 1) == chance(5, 1)).all()
    assert (chance(5, 1) != chance(5, 2)).all()


@pytest.mark.parametrize("rows", [200, 12])
def test_least_squares_is_the_closed_form(rows: int) -> None:
    """Ridge around a prior, as an ordinary least-squares problem with more rows."""
    torch.manual_seed(0)
    x, y, prior = torch.randn(rows, 20), torch.randn(rows, 3), torch.randn(3, 20)
    strength = 0.1 * float(x.double().square().sum()) / 20
    stacked = torch.cat([x.double(), strength**0.5 * torch.eye(20, dtype=torch.float64)])
    wanted = torch.cat([y.double(), strength**0.5 * prior.double().T])
    expected = torch.linalg.lstsq(stacked, wanted).solution.T
    torch.testing.assert_close(least_squares(x, y, prior, ridge=0.1).double(), expected, rtol=1e-4, atol=1e-5)


def test_least_squares_finds_the_weight_that_made_the_targets() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(300, 8), torch.randn(4, 8)
    torch.testing.assert_close(
        least_squares(x, x @ weight.T, torch.zeros(4, 8), ridge=1e-9), weight, rtol=1e-4, atol=1e-4
    )


def test_least_squares_on_dead_inputs_keeps_the_prior() -> None:
    prior = torch.randn(2, 3)
    assert torch.equal(least_squares(torch.zeros(5, 3), torch.randn(5, 2), prior), prior)
