"""Learned rounding: where it starts, where it ends, and that it finds what trying all ways finds."""

from __future__ import annotations

import itertools

import pytest
import torch

from tersenet.numerics.learned_rounding import hard_weight, sharpness, soft_weight, start, undecided, up_share


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_it_starts_at_the_float_weight_and_would_round_to_nearest() -> None:
    w, scale = weight(4, 6), torch.tensor([[0.3], [0.5], [0.7], [0.2]])
    learned = start(w, scale)
    torch.testing.assert_close(soft_weight(w, learned, scale, 0, -127, 127), w, rtol=1e-4, atol=1e-5)
    nearest = torch.round(w / scale) * scale
    torch.testing.assert_close(hard_weight(w, learned, scale, 0, -127, 127), nearest)


def test_decided_ones_cost_nothing_and_are_the_same_soft_and_hard() -> None:
    w, scale = weight(30), torch.tensor(0.4)
    learned = torch.where(weight(30).roll(7) > 0, 9.0, -9.0)
    assert undecided(learned, 2.0).item() == 0.0
    assert set(up_share(learned).tolist()) == {0.0, 1.0}
    soft, hard = (f(w, learned, scale, 2, 0, 7) for f in (soft_weight, hard_weight))
    assert torch.equal(soft, hard)
    # (q - z) s with q of 0 .. 7
    assert float(hard.min()) >= -0.8 - 1e-6
    assert float(hard.max()) <= 2.0 + 1e-6


def test_the_regulariser_s_formula() -> None:
    learned = torch.tensor([0.0, 0.4, -1.0])
    h = up_share(learned)
    assert h[0].item() == pytest.approx(0.5)
    expected = sum(1 - abs(2 * float(part) - 1) ** 3 for part in h)
    assert undecided(learned, 3.0).item() == pytest.approx(expected)


def test_the_exponent_falls() -> None:
    values = [sharpness(p / 20) for p in range(21)]
    assert values[:4] == [20.0] * 4
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert sharpness(0.6) == pytest.approx(11.0)


def test_learning_finds_a_better_rounding_than_nearest() -> None:
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(1)) @ weight(6, 6) + 1.0
    w, scale = weight(1, 6), torch.tensor(0.6)
    wanted = x @ w.T

    def error(made: torch.Tensor) -> float:
        return float((x @ made.T - wanted).square().mean())

    learned = start(w, scale).requires_grad_()
    optimizer = torch.optim.Adam([learned], lr=0.02)
    for step in range(400):
        progress = step / 400
        loss = (x @ soft_weight(w, learned, scale, 0, -7, 7).T - wanted).square().mean()
        if progress >= 0.2:
            loss = loss + 0.05 * undecided(learned, sharpness(progress))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = error(hard_weight(w, learned.detach(), scale, 0, -7, 7))
    floor = torch.floor(w / scale)
    ways = [(floor + torch.tensor([ups])) * scale for ups in itertools.product((0.0, 1.0), repeat=6)]
    assert found <= sorted(error(made) for made in ways)[2]  # among the best three of 64
    assert found < 0.5 * error(torch.round(w / scale) * scale)
