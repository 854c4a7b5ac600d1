"""Rated rounding against plain rounding, all combinations, and what prices must do."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tersenet.numerics.rated_rounding import LARGEST, Bits, round_rated, rounded, steps_of
from tersenet.numerics.repaired_rounding import damped


def layer(outputs: int = 8, inputs: int = 18, groups: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, a damped Gram matrix of inputs that go together, and sensitivities that differ by far."""
    source = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, inputs, inputs, generator=source, dtype=torch.float64)
    x = torch.randn(groups, 300, inputs, generator=source, dtype=torch.float64) @ mixing
    weight = torch.randn(groups, outputs, inputs, generator=source, dtype=torch.float64)
    return weight, damped(x.mT @ x / 300, 0.01), torch.logspace(-2, 0, groups * outputs).double().view(groups, outputs)


def by_size(q: Tensor) -> Bits:
    """Zero costs 1 bit, others 2 and one more for each unit."""
    return lambda column, numbers: torch.where(numbers == 0, 1.0, 2.0 + numbers.abs())


def cost(weight: Tensor, gram: Tensor, sensitivity: Tensor, step: Tensor, q: Tensor, price: float) -> float:
    change = q * step[..., None] - weight
    damage = 0.5 * (sensitivity * ((change @ gram) * change).sum(-1)).sum()
    return float(damage + price * by_size(q)(0, q).sum())


@pytest.mark.parametrize("groups", [1, 3])
def test_it_beats_plain_rounding_and_rounding_with_a_dead_zone(groups: int) -> None:
    weight, gram, sensitivity = layer(groups=groups)
    price = 0.05
    step = steps_of(gram, sensitivity, price, 3.2)
    found = cost(weight, gram, sensitivity, step, round_rated(weight, gram, sensitivity, step, price, by_size), price)
    for zone in (0.5, 0.4, 0.3):
        plain = weight.sign() * torch.floor(weight.abs() / step[..., None] + zone)
        assert found < 0.95 * cost(weight, gram, sensitivity, step, plain, price)


def test_it_comes_near_the_best_of_all_combinations() -> None:
    for seed in range(3):
        weight, gram, sensitivity = layer(outputs=1, inputs=4, seed=seed)
        step, price = torch.full((1, 1), 0.7, dtype=torch.float64), 0.02
        best = min(
            cost(weight, gram, sensitivity, step, torch.tensor(q, dtype=torch.float64).view(1, 1, 4), price)
            for q in itertools.product(range(-4, 5), repeat=4)
        )
        q = round_rated(weight, gram, sensitivity, step, price, by_size, sweeps=10)
        assert cost(weight, gram, sensitivity, step, q, price) < 1.25 * best


def test_the_sweeps_only_lower_the_cost() -> None:
    weight, gram, sensitivity = layer()
    step = steps_of(gram, sensitivity, 0.05, 3.2)
    totals = [
        cost(
            weight, gram, sensitivity, step, round_rated(weight, gram, sensitivity, step, 0.05, by_size, sweeps=n), 0.05
        )
        for n in range(4)
    ]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < totals[0]


def test_a_higher_price_makes_more_zeros_and_a_price_of_nothing_rounds() -> None:
    weight, gram, sensitivity = layer()
    step = torch.full((1, 8), 0.3, dtype=torch.float64)
    zeros = [
        int((round_rated(weight, gram, sensitivity, step, price, by_size) == 0).sum())
        for price in (0.0, 0.05, 0.5, 50.0)
    ]
    assert zeros == sorted(zeros)
    assert zeros[-1] == weight.numel()
    free = round_rated(weight, torch.eye(18).double()[None], sensitivity, step, 0.0, by_size)
    assert torch.equal(free, torch.round(weight / 0.3))


def test_steps_follow_sensitivity_and_inputs() -> None:
    _, gram, sensitivity = layer()
    step = steps_of(gram, sensitivity, 0.05, 3.2)
    ratio = step[0, 0] / step[0, -1]
    assert ratio == pytest.approx(10.0, rel=0.1)  # the root of 100, in 4 digits each
    stronger = steps_of(4 * gram, sensitivity, 0.05, 3.2)
    assert torch.equal(stronger, step / 2)
    assert torch.equal(steps_of(gram, sensitivity, 0.2, 3.2), 2 * step)


def test_numbers_stay_in_reach() -> None:
    weight, gram, sensitivity = layer()
    q = round_rated(1e6 * weight, gram, sensitivity, torch.ones(1, 8).double(), 0.01, by_size)
    assert q.abs().max() == LARGEST


def test_rounded_has_so_many_digits() -> None:
    x = torch.tensor([1.0, 1.06, 0.3, -5.7, 0.0])
    assert rounded(x, 4).tolist() == [1.0, 1.0, 0.3125, -5.5, 0.0]
