"""Optimal clustering of numbers against all ways to split them, and the codebook's gradient against autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersenet.numerics.codebooks import (
    EXACT,
    even_codebook,
    nearest_codes,
    optimal_codebook,
    summed_gradients,
)


def error(x: Tensor, codebook: Tensor, importance: Tensor | float = 1.0) -> float:
    made = codebook.double()[nearest_codes(x, codebook)]
    return float(((x.double() - made).square() * importance).sum())


def least(x: Tensor, count: int, importance: Tensor) -> float:
    """By trying every way to split the sorted numbers."""
    order = torch.argsort(x)
    x, importance = x[order], importance[order]
    best = float("inf")
    for inner in itertools.combinations(range(1, len(x)), count - 1):
        bounds, total = (0, *inner, len(x)), 0.0
        for a, b in itertools.pairwise(bounds):
            h = importance[a:b]
            mean = (h * x[a:b]).sum() / h.sum().clamp(min=1e-300)
            total += float((h * (x[a:b] - mean).square()).sum())
        best = min(best, total)
    return best


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 11), count=st.integers(1, 5), ties=st.booleans(), far=st.booleans())
def test_no_split_is_better(seed: int, n: int, count: int, ties: bool, far: bool) -> None:
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=source, dtype=torch.float64)
    if ties:
        x = (2 * x).round()
    x = x + 1000.0 * far
    importance = torch.rand(n, generator=source, dtype=torch.float64) + 0.01
    for heavy in (None, importance):
        h = torch.ones_like(x) if heavy is None else heavy
        found = optimal_codebook(x, count, heavy)
        assert len(found) == min(count, len(x.unique()))
        assert bool((found.diff() > 0).all())
        assert error(x, found, h) <= least(x, min(count, n), h) * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("count", [2, 7, 16])
def test_divide_and_conquer_is_the_plain_dynamic_program(count: int) -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    line, _ = torch.sort(x)
    one, two = (torch.cat([torch.zeros(1), p.cumsum(0)]).double() for p in (line, line**2))
    i, j = torch.arange(201)[:, None], torch.arange(201)
    cost = (two[i] - two[j]) - (one[i] - one[j]) ** 2 / (i - j).clamp(min=1)
    cost = torch.where(i > j, cost, torch.where(i == j, 0.0, torch.inf))
    table = cost[:, 0]
    for _ in range(count - 1):
        table = (table + cost).amin(dim=1)
    assert error(x, optimal_codebook(x, count)) == pytest.approx(float(table[-1]), rel=1e-6)


def test_with_many_values_it_beats_even_starts_and_random_ones() -> None:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(3 * EXACT, generator=source) * torch.rand(3 * EXACT, generator=source)
    x[0] = 60.0  # far outside
    heavy = torch.rand(3 * EXACT, generator=source)
    for h in (None, heavy):
        weights = 1.0 if h is None else h
        found = error(x, optimal_codebook(x, 16, h), weights)
        assert found <= error(x, even_codebook(x, 16, importance=h), weights) * (1 + 1e-9)
        # A finer answer: the same program on 10,000 numbers that are nearly these.
        near = optimal_codebook((x * 200).round() / 200, 16, h)
        assert found <= error(x, near, weights) * 1.001


def test_with_many_values_each_is_the_mean_of_its_own() -> None:
    x = torch.randn(3 * EXACT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0] = 1e4  # the evenly spaced places are far apart
    found = optimal_codebook(x, 64)
    codes = nearest_codes(x, found)
    means = torch.stack([x[codes == k].mean() for k in range(64)])
    off = (found - means).abs()
    # The ends move a little for long; without that some are off by more.
    assert float(off.max()) < 3e-4


def test_what_has_no_importance_counts_for_nothing() -> None:
    x = torch.tensor([0.0, 1.0, 50.0, 60.0])
    assert optimal_codebook(x, 2, torch.tensor([1.0, 1.0, 0.0, 0.0])).tolist() == [0.0, 1.0]
    assert optimal_codebook(x, 2, torch.zeros(4)).tolist() == [0.5, 55.0]
    assert optimal_codebook(torch.zeros(2, 3), 4).tolist() == [0.0]
    with pytest.raises(ValueError, match="got 0"):
        optimal_codebook(x, 0)


def test_codes_are_of_the_nearest_value() -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    codebook = torch.tensor([-1.0, -0.2, 0.3, 2.0])
    assert torch.equal(nearest_codes(x, codebook), (x[..., None] - codebook).abs().argmin(dim=-1))
    assert nearest_codes(x, torch.tensor([3.0])).unique().tolist() == [0]


def test_gradients_of_shared_values_are_those_of_autograd() -> None:
    codes = torch.tensor([[0, 2, 2], [1, 0, 2]])
    codebook = torch.tensor([0.1, 0.2, 0.3, 0.4], requires_grad=True)
    gradient = torch.randn(2, 3)
    codebook[codes].backward(gradient)
    assert codebook.grad is not None
    torch.testing.assert_close(summed_gradients(gradient, codes, 4), codebook.grad)
