from __future__ import annotations

import numpy as np
import pytest

from tersenet.numerics.lasso import lasso_entries


def test_orthogonal_terms_come_in_at_their_correlation() -> None:
    """Closed form: with orthonormal terms, term i is used for strengths below |x_i' y|."""
    target = np.array([3.0, -1.0, 0.5, 0.02, 0.0])
    found = lasso_entries(np.eye(5), target, steps=400)
    np.testing.assert_allclose(found[:4], np.abs(target[:4]) / 3, rtol=0.03)
    assert found[4] == 0


def test_against_subgradients_on_correlated_terms() -> None:
    """At a strength, the terms in use are those of an independent solver (proximal gradient)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 12)) @ rng.normal(size=(12, 12))
    y = x @ rng.normal(size=12)
    gram, target = x.T @ x, x.T @ y
    entries = lasso_entries(gram, target, steps=200)
    for share in (0.5, 0.1, 0.02):
        strength, weights = share * np.abs(target).max(), np.zeros(12)
        size = 1 / np.linalg.eigvalsh(gram)[-1]
        for _ in range(50000):
            moved = weights - size * (gram @ weights - target)
            weights = np.sign(moved) * np.maximum(0, np.abs(moved) - size * strength)
        used = weights != 0
        assert entries[used].min() > entries[~used].max(initial=0) * 0.99
        assert (entries > share * 1.05).sum() <= used.sum()


def test_what_is_a_copy_is_not_needed() -> None:
    x = np.random.default_rng(0).normal(size=(100, 3))
    both = np.concatenate([x, 0.5 * x[:, :1]], axis=1)
    y = both.sum(axis=1)
    found = lasso_entries(both.T @ both, both.T @ y)
    assert found[3] == found.min()


@pytest.mark.parametrize("count", [1, 4])
def test_nothing_to_explain(count: int) -> None:
    assert lasso_entries(np.eye(count), np.zeros(count)).tolist() == [0.0] * count
