"""Least squares with zeros against numpy's solution of each row's own problem."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tersenet.numerics.masked_squares import masked_least_squares
from tersenet.numerics.second_order import refit_rows

G = torch.Generator().manual_seed(0)
X = torch.randn(200, 12, generator=G, dtype=torch.float64) @ torch.randn(12, 12, generator=G, dtype=torch.float64)
T = torch.randn(200, 5, generator=G, dtype=torch.float64)
PRIOR = torch.randn(5, 12, generator=G, dtype=torch.float64)
STAYS = torch.rand(5, 12, generator=G) < 0.5
STAYS[0], STAYS[1] = True, False


@pytest.mark.parametrize("ridge", [1e-6, 0.1])
def test_each_row_is_its_own_least_squares_problem(ridge: float) -> None:
    gram = X.T @ X
    found = masked_least_squares(gram, T.T @ X, PRIOR, STAYS, ridge, rounds=1000)
    strength = ridge * float(gram.diagonal().mean())
    for row in range(5):
        stays = STAYS[row].numpy()
        matrix = np.concatenate([X.numpy()[:, stays], strength**0.5 * np.eye(12)[:, stays]])
        target = np.concatenate([T.numpy()[:, row], strength**0.5 * PRIOR.numpy()[row]])
        wanted = np.linalg.lstsq(matrix, target, rcond=None)[0]
        assert np.allclose(found[row].numpy()[stays], wanted, rtol=1e-4, atol=1e-6)
        assert not found[row].numpy()[~stays].any()


def test_it_agrees_with_the_surgeon_row_by_row() -> None:
    gram = X.T @ X
    ours = masked_least_squares(gram, PRIOR @ gram, PRIOR, STAYS, 1e-3, rounds=1000)
    assert torch.allclose(ours, refit_rows(PRIOR, STAYS, gram, 1e-3), atol=1e-6)


def test_inputs_of_zeros_leave_the_prior() -> None:
    zero = torch.zeros(12, 12)
    assert torch.equal(masked_least_squares(zero, torch.zeros(5, 12), PRIOR, STAYS), PRIOR * STAYS)


def test_stopping_early_does_no_harm() -> None:
    gram = X.T @ X
    cross = T.T @ X

    def error(weight: torch.Tensor) -> float:
        return float((X @ weight.T - T).square().sum())

    errors = [error(masked_least_squares(gram, cross, PRIOR, STAYS, 1e-9, rounds)) for rounds in (0, 1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]
