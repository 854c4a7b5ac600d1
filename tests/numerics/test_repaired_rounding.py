"""Repaired rounding against the paper's loop, against all combinations, and against plain rounding."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tersenet.numerics.codebooks import optimal_codebook
from tersenet.numerics.grids import Grid, extremes, least_squares_scales
from tersenet.numerics.powers_of_two import round_power
from tersenet.numerics.repaired_rounding import (
    damped,
    descend,
    layer_error,
    onto_codebook,
    onto_grid,
    refit_scales,
    round_columns,
    round_to_grid,
)


def layer(outputs: int = 6, inputs: int = 12, seed: int = 0, groups: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Weights, and the Gram matrix of inputs that go together."""
    source = torch.Generator().manual_seed(seed)
    mixing = torch.randn(*groups, inputs, inputs, generator=source)
    x = torch.randn(*groups, 300, inputs, generator=source) @ mixing + 0.5
    return torch.randn(*groups, outputs, inputs, generator=source), x.mT @ x / 300


def total(weight: Tensor, made: Tensor, gram: Tensor, damping: float = 0.01) -> float:
    return float(layer_error(made.double() - weight.double(), damped(gram, damping)).sum())


def test_the_error_is_that_of_the_layer_s_outputs() -> None:
    x, weight = torch.randn(50, 5), torch.randn(3, 5)
    made = weight.round()
    direct = (x @ (made - weight).T).square().sum(dim=0)
    torch.testing.assert_close(layer_error(made - weight, x.T @ x), direct.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [1, 5, 128])
@pytest.mark.parametrize("by_activation", [False, True])
def test_columns_are_as_in_optimal_brain_compression(block: int, by_activation: bool) -> None:
    """Against the slow way: round one weight, then solve for all that are left."""
    weight, gram = layer()
    grid = Grid(3)
    scale, zero_point = extremes(weight, grid)
    nearest = onto_grid(grid, scale, zero_point, weight.shape)
    found = round_columns(weight, gram, nearest, by_activation=by_activation, block=block)
    hessian = damped(gram)
    order = torch.argsort(hessian.diagonal(), descending=True) if by_activation else torch.arange(12)
    for row, wanted in enumerate(weight.double()):
        made = wanted.clone()
        left = order.tolist()
        for column in order.tolist():
            value = made.clone()
            value = nearest(made[column].expand(6), column)[row]
            made[column] = value
            left.remove(column)
            if left:
                # The others move to the minimum of (v - w) H (v - w)' with what is rounded held.
                done = [c for c in range(12) if c not in left]
                pull = hessian[left][:, done] @ (made - wanted)[done]
                made[left] = wanted[left] - torch.linalg.solve(hessian[left][:, left], pull)
        torch.testing.assert_close(found[row].double(), made, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "grid", [Grid(2), Grid(3, signed=False), Grid(4, granularity=4), Grid(3, granularity="tensor")]
)
def test_each_step_lowers_the_error_and_stays_on_the_grid(grid: Grid) -> None:
    weight, gram = layer()
    scale, zero_point = least_squares_scales(weight, grid)
    nearest = onto_grid(grid, scale, zero_point, weight.shape)
    plain = grid.round(weight, scale, zero_point)
    columns = round_columns(weight, gram, nearest)
    moved = descend(weight, columns, gram, nearest)
    torch.testing.assert_close(grid.round(columns, scale, zero_point), columns)
    torch.testing.assert_close(grid.round(moved, scale, zero_point), moved)
    assert total(weight, moved, gram) <= total(weight, columns, gram) * (1 + 1e-6) < total(weight, plain, gram)
    made, scales, zeros = round_to_grid(weight, gram, grid)
    torch.testing.assert_close(grid.round(made, scales, zeros), made)
    assert total(weight, made, gram) < total(weight, plain, gram)


def test_no_single_weight_could_be_better_after_the_descent() -> None:
    weight, gram = layer(outputs=3, inputs=6)
    grid = Grid(3)
    scale, zero_point = extremes(weight, grid)
    nearest = onto_grid(grid, scale, zero_point, weight.shape)
    found = descend(weight, grid.round(weight, scale, zero_point), gram, nearest, sweeps=100, block=4)
    least = total(weight, found, gram)
    for o, i, q in itertools.product(range(3), range(6), range(-3, 4)):
        other = found.clone()
        other[o, i] = q * scale[o, 0]
        assert total(weight, other, gram) >= least * (1 - 1e-6)


def test_near_to_the_best_of_all_combinations() -> None:
    """Six weights of 2 bits: 729 ways. Plain rounding is far off, the repair is not."""
    grid, ratios, plains = Grid(2), [], []
    every = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=6)))
    for seed in range(10):
        weight, gram = layer(outputs=1, inputs=6, seed=seed)
        scale, zero_point = least_squares_scales(weight, grid)
        best = float(layer_error(every * scale - weight, damped(gram)).min())
        nearest = onto_grid(grid, scale, zero_point, weight.shape)
        found = descend(weight, round_columns(weight, gram, nearest), gram, nearest)
        ratios.append(total(weight, found, gram) / best)
        plains.append(total(weight, grid.round(weight, scale, zero_point), gram) / best)
    assert min(ratios) >= 1 - 1e-5
    assert sum(ratios) / 10 < 1.1 < 1.25 < sum(plains) / 10


@pytest.mark.parametrize("grid", [Grid(3), Grid(3, granularity="tensor"), Grid(3, granularity=5)])
def test_scales_are_the_least_squares_ones(grid: Grid) -> None:
    weight, gram = layer()
    scale, zero_point = extremes(weight, grid)
    steps = grid.integers(weight, scale, zero_point).float()
    found = refit_scales(weight, steps, gram, grid, scale)
    wiggled = found.double().clone().requires_grad_()
    made = steps.double() * grid.spread(wiggled, weight.shape)
    layer_error(made - weight.double(), damped(gram)).sum().backward()
    assert wiggled.grad is not None
    before = scale.double().clone().requires_grad_()
    layer_error(steps.double() * grid.spread(before, weight.shape) - weight.double(), damped(gram)).sum().backward()
    assert before.grad is not None
    assert float(wiggled.grad.abs().max()) < 1e-4 * float(before.grad.abs().max())


def test_groups_of_a_convolution_are_repaired_apart() -> None:
    weight, gram = layer(outputs=2, inputs=9, groups=(4,))
    grid = Grid(3)
    made, scales, zeros = round_to_grid(weight, gram, grid)
    torch.testing.assert_close(grid.round(made.view(8, 9), scales, zeros).view(4, 2, 9), made)
    assert scales.shape == zeros.shape == (8, 1)
    # The order of columns is common to all groups, so without it.
    nearest = onto_grid(grid, scales, zeros, weight.shape)
    columns = round_columns(weight, gram, nearest, by_activation=False)
    moved = descend(weight, columns, gram, nearest)
    for g in range(4):
        own = onto_grid(grid, scales[2 * g : 2 * g + 2], zeros[2 * g : 2 * g + 2], weight[g].shape)
        alone = round_columns(weight[g], gram[g], own, by_activation=False)
        torch.testing.assert_close(columns[g], alone)
        torch.testing.assert_close(moved[g], descend(weight[g], alone, gram[g], own))


def test_any_set_of_values_can_be_repaired() -> None:
    weight, gram = layer()

    def nearest(values: Tensor, column: int) -> Tensor:
        return round_power(values, -2, 1)

    found = descend(weight, round_columns(weight, gram, nearest), gram, nearest)
    assert torch.equal(round_power(found, -2, 1), found)
    assert total(weight, found, gram) < total(weight, round_power(weight, -2, 1), gram)


def test_shared_values_can_be_repaired() -> None:
    weight, gram = layer()
    codebook = optimal_codebook(weight, 8)
    nearest = onto_codebook(codebook)
    plain = nearest(weight, 0).float()
    torch.testing.assert_close(plain, codebook[(weight[..., None] - codebook).abs().argmin(dim=-1)])
    found = descend(weight, round_columns(weight, gram, nearest), gram, nearest)
    assert bool(torch.isin(found, codebook).all())
    assert total(weight, found, gram) < 0.8 * total(weight, plain, gram)


def test_inputs_that_are_zero_or_equal_do_no_harm() -> None:
    weight, gram = layer()
    gram[:, 3] = gram[3, :] = 0.0
    gram[5] = gram[4]
    gram[:, 5] = gram[:, 4]
    for matrix in (gram, torch.zeros_like(gram)):
        made, scale, zero_point = round_to_grid(weight, matrix, Grid(4))
        assert bool(torch.isfinite(made).all())
        torch.testing.assert_close(Grid(4).round(made, scale, zero_point), made)
    grid = Grid(4)
    made, scale, zero_point = round_to_grid(torch.zeros(6, 12), gram, grid)
    assert torch.equal(made, torch.zeros(6, 12))
