from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tersenet.numerics.elimination import Reader, eliminate


def best_error(gram: Tensor, weight: Tensor, kept: list[int]) -> tuple[float, Tensor]:
    """Squared error of the best weights on these inputs, by solving the normal equations, and those weights."""
    new = torch.zeros_like(weight)
    if kept:
        new[:, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ weight.T).T
    change = new - weight
    return float((change @ gram * change).sum()), new


def problem(seed: int, channels: int, places: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = channels * places
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    inputs = torch.randn(200, size, generator=generator, dtype=torch.float64) @ mix
    groups = torch.arange(size).view(channels, places)
    return inputs.T @ inputs, torch.randn(outputs, size, generator=generator, dtype=torch.float64), groups


@pytest.mark.parametrize("places", [1, 3])
def test_each_removal_is_the_cheapest_and_its_error_is_exact(places: int) -> None:
    gram, weight, groups = problem(0, 5, places, 4)
    found = eliminate([Reader(gram, weight, groups)], keep=range(1, 6), ridge=1e-12)
    kept = set(range(5))
    for step in range(4):
        errors = {c: best_error(gram, weight, groups[sorted(kept - {c})].flatten().tolist())[0] for c in kept}
        assert found.order[step] == min(errors, key=lambda c: errors[c])
        kept.remove(found.order[step])
        error, new = best_error(gram, weight, groups[sorted(kept)].flatten().tolist())
        assert found.errors[step + 1] == pytest.approx(error, rel=1e-6)
        torch.testing.assert_close(found.weights[len(kept)][0], new, rtol=1e-5, atol=1e-7)
    assert found.errors[0] == 0.0
    assert found.errors[-1] == pytest.approx(float((weight @ gram * weight).sum()), rel=1e-6)


def test_readers_are_counted_together() -> None:
    a, b = problem(1, 4, 1, 2), problem(2, 4, 2, 3)
    found = eliminate([Reader(*a), Reader(*b)], ridge=1e-12)

    def error(kept: tuple[int, ...]) -> float:
        return sum(best_error(g, w, groups[list(kept)].flatten().tolist())[0] for g, w, groups in (a, b))

    best = min(itertools.combinations(range(4), 3), key=error)
    assert found.order[0] == (set(range(4)) - set(best)).pop()
    assert found.errors[1] == pytest.approx(error(best), rel=1e-6)


def test_a_copy_costs_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(100, 4, generator=generator)
    inputs[:, 3] = inputs[:, 1]
    found = eliminate([Reader(inputs.T @ inputs, torch.ones(2, 4), torch.arange(4)[:, None])], keep=[3], ridge=1e-9)
    assert found.order[0] in (1, 3)
    assert found.errors[1] < 1e-5
    assert found.weights[3][0][0].max() == pytest.approx(2.0, abs=1e-4)


def test_inputs_that_are_always_zero_go_first() -> None:
    gram = torch.diag(torch.tensor([1.0, 0.0, 2.0]))
    assert eliminate([Reader(gram, torch.ones(1, 3), torch.arange(3)[:, None])]).order[0] == 1
    assert eliminate([Reader(gram * 0, torch.ones(1, 3), torch.arange(3)[:, None])]).order


def test_a_given_order_is_kept() -> None:
    gram, weight, groups = problem(3, 4, 2, 3)
    found = eliminate([Reader(gram, weight, groups)], keep=[2], order=[2, 0, 3, 1], ridge=1e-12)
    assert found.order == [2, 0, 3, 1]
    error, new = best_error(gram, weight, groups[[1, 3]].flatten().tolist())
    assert found.errors[2] == pytest.approx(error, rel=1e-6)
    torch.testing.assert_close(found.weights[2][0], new, rtol=1e-5, atol=1e-7)
