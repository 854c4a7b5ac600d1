"""Ternary weights against all supports, a fine search, and numerical gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tersenet.numerics.ternary import signs_beyond, ttq, ttq_start, twn_exact, twn_rule


def error(rows: Tensor, threshold: Tensor, scale: Tensor) -> Tensor:
    return (signs_beyond(rows, threshold[:, None]) * scale[:, None] - rows).square().sum(dim=1)


def test_no_choice_of_signs_and_scale_is_better() -> None:
    rows = torch.randn(8, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    every = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=7)), dtype=torch.float64)[None]
    scales = (every * rows[:, None]).sum(2) / every.square().sum(2).clamp(min=1)
    best = (every * scales[..., None] - rows[:, None]).square().sum(2).amin(dim=1)
    torch.testing.assert_close(error(rows, *twn_exact(rows)), best)


def test_the_paper_s_rule_is_near_to_it_for_many_normal_weights() -> None:
    rows = torch.randn(3, 20000, generator=torch.Generator().manual_seed(0))
    threshold, scale = twn_rule(rows)
    torch.testing.assert_close(threshold, 0.7 * rows.abs().mean(dim=1))
    exact, rule = error(rows, *twn_exact(rows)), error(rows, threshold, scale)
    assert bool((exact <= rule * (1 + 1e-6)).all())
    assert bool((rule < exact * 1.01).all())
    # Of a normal density the best threshold is 0.612 standard deviations.
    torch.testing.assert_close(twn_exact(rows)[0], torch.full((3,), 0.612), rtol=0, atol=0.03)


def test_importance_decides_the_scale_and_the_threshold() -> None:
    row = torch.tensor([[1.0, 0.9, 0.5, -0.4]])
    heavy = torch.tensor([1.0, 1.0, 50.0, 50.0])
    threshold, scale = twn_exact(row, heavy)
    tried = []
    for m in range(1, 5):
        h, w = heavy[:m], row[0, :m].abs()
        a = (h * w).sum() / h.sum()
        tried.append(float((h * (w - a) ** 2).sum() + (heavy[m:] * row[0, m:] ** 2).sum()))
    made = signs_beyond(row, threshold[:, None]) * scale[:, None]
    assert float((heavy * (made - row) ** 2).sum()) == pytest.approx(min(tried))


def test_equal_magnitudes_stay_together() -> None:
    source = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 5, (500, 8), generator=source).double()
    heavy = torch.rand(500, 8, generator=source, dtype=torch.float64)
    for h in (None, heavy):
        threshold, _ = twn_exact(rows, h)
        # Parted, the threshold in the middle between the two would be their magnitude.
        assert not bool(((rows == threshold[:, None]) & (rows > 0)).any())


def test_ties_and_zeros() -> None:
    rows = torch.tensor([[0.0, 0.0, 0.0], [2.0, -2.0, 2.0], [0.0, 3.0, 0.0]])
    threshold, scale = twn_exact(rows)
    assert scale.tolist() == [0.0, 2.0, 3.0]
    assert torch.equal(signs_beyond(rows, threshold[:, None]) * scale[:, None], rows)
    assert twn_rule(torch.zeros(1, 3))[1].tolist() == [0.0]


def test_two_scales_and_their_gradients() -> None:
    weight = torch.tensor([[-0.9, -0.01], [0.02, 0.5]], requires_grad=True)
    positive, negative = torch.tensor(0.6, requires_grad=True), torch.tensor(0.8, requires_grad=True)
    y = ttq(weight, positive, negative, torch.tensor(0.1))
    torch.testing.assert_close(y, torch.tensor([[-0.8, 0.0], [0.0, 0.6]]))
    y.backward(torch.tensor([[2.0, 3.0], [5.0, 7.0]]))
    assert weight.grad is not None
    assert positive.grad is not None
    assert negative.grad is not None
    torch.testing.assert_close(weight.grad, torch.tensor([[1.6, 3.0], [5.0, 4.2]]))
    # The scales' gradients are true ones.
    assert positive.grad.item() == pytest.approx(7.0)
    assert negative.grad.item() == pytest.approx(-2.0)


def test_slopes_in_units_of_the_weights_and_smaller_steps_of_the_scales() -> None:
    weight = torch.tensor([[-0.09, -0.001], [0.002, 0.05]], requires_grad=True)
    positive, negative = torch.tensor(0.06, requires_grad=True), torch.tensor(0.08, requires_grad=True)
    ttq(weight, positive, negative, torch.tensor(0.01), torch.tensor(0.1), 0.5).backward(
        torch.tensor([[2.0, 3.0], [5.0, 7.0]])
    )
    torch.testing.assert_close(weight.grad, torch.tensor([[1.6, 3.0], [5.0, 4.2]]))
    assert positive.grad is not None
    assert negative.grad is not None
    assert positive.grad.item() == pytest.approx(3.5)
    assert negative.grad.item() == pytest.approx(-1.0)


def test_scales_per_output_sum_over_their_own() -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    positive, negative = torch.rand(3, 1, requires_grad=True), torch.rand(3, 1, requires_grad=True)
    gradient = torch.randn(3, 4)
    ttq(weight, positive, negative, torch.tensor(0.3)).backward(gradient)
    assert positive.grad is not None
    torch.testing.assert_close(positive.grad, (gradient * (weight > 0.3)).sum(dim=1, keepdim=True))


def test_the_start_is_the_least_squares_one() -> None:
    weight = torch.randn(500, generator=torch.Generator().manual_seed(0))
    positive, negative, threshold = ttq_start(weight)
    assert float(threshold) == pytest.approx(0.05 * float(weight.abs().max()))
    p, n = (part.double().requires_grad_() for part in (positive, negative))
    (ttq(weight.double(), p, n, threshold.double()) - weight).square().sum().backward()
    assert p.grad is not None
    assert n.grad is not None
    assert abs(float(p.grad)) < 1e-3
    assert abs(float(n.grad)) < 1e-3
    assert [float(part) for part in ttq_start(torch.tensor([1.0, 1.0]))[:2]] == [1.0, 1.0]
