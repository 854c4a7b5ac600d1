"""Learned ranges: forward values against rounding, gradients against the papers' cases and finite differences."""

from __future__ import annotations

import pytest
import torch

from tersenet.numerics.rounding import fake_quantize, grid
from tersenet.numerics.straight_through import (
    dorefa_activation,
    dorefa_weight,
    lsq,
    lsq_factor,
    lsq_start,
    pact,
)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("zero_point", [0, 3])
def test_the_learned_step_case_by_case(zero_point: int) -> None:
    low, high = (0, 7) if zero_point else grid(3, signed=True, full=True)
    x = torch.tensor([-9.0, -0.7, 0.0, 0.6, 1.49, 30.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    y = lsq(x, scale, zero_point, low, high, factor=0.1)
    assert torch.equal(y.detach(), fake_quantize(x.detach(), scale.detach(), zero_point, low, high))
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    y.backward(upstream)
    total = 0.0
    for value, up in zip(x.tolist(), upstream.tolist(), strict=True):
        q = round(value / 0.5) + zero_point
        inside = low <= q <= high
        total += up * ((q - zero_point - value / 0.5) if inside else (low if q < low else high) - zero_point)
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(0.1 * total, rel=1e-5)
    steps = torch.round(x.detach() / 0.5) + zero_point
    torch.testing.assert_close(x.grad, upstream * ((steps >= low) & (steps <= high)))


def test_the_step_s_gradient_is_a_true_one_where_rounding_stands_still() -> None:
    """With x/s inside the grid y = q s, so without the estimator's -x/s the slope is q: finite differences agree."""
    x = normal(200).double()
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    lsq(x, scale, 0, -4, 3, factor=1.0).sum().backward()
    inside = (torch.round(x / 0.3) >= -4) & (torch.round(x / 0.3) <= 3)
    near = [fake_quantize(x, torch.tensor(0.3 + e, dtype=torch.float64), 0, -4, 3).sum() for e in (1e-9, -1e-9)]
    assert scale.grad is not None
    true = float((near[0] - near[1]) / 2e-9)
    assert float(scale.grad) == pytest.approx(true - float((x / 0.3)[inside].sum()), rel=1e-4)


def test_a_scale_per_channel_gets_its_own_gradient() -> None:
    x = normal(3, 4, 5)
    scale = torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1).requires_grad_()
    lsq(x, scale, 0, -2, 1, factor=1.0).square().sum().backward()
    for c in range(3):
        own = scale.detach()[c].clone().requires_grad_()
        lsq(x[c], own, 0, -2, 1, factor=1.0).square().sum().backward()
        assert scale.grad is not None
        torch.testing.assert_close(scale.grad[c], own.grad)


def test_start_and_factor() -> None:
    assert float(lsq_start(torch.tensor([1.0, -3.0]), 4)) == pytest.approx(2.0)
    assert float(lsq_start(torch.zeros(3), 4)) == 1.0
    assert lsq_factor(2304, 1) == pytest.approx(1 / 48)


def test_descent_on_the_step_lowers_the_error() -> None:
    x = normal(1000)
    scale = lsq_start(x, 3).requires_grad_()
    errors = []
    for _ in range(100):
        loss = (lsq(x, scale, 0, -4, 3, lsq_factor(1000, 3)) - x).square().sum()
        (step,) = torch.autograd.grad(loss, scale)
        errors.append(loss.item())
        scale = (scale - 3e-3 * step).detach().requires_grad_()
    assert min(errors) < 0.75 * errors[0]


@pytest.mark.parametrize("bits", [2, 4])
def test_dorefa_weights(bits: int) -> None:
    w = normal(50).requires_grad_()
    made = dorefa_weight(w, bits)
    n = 2**bits - 1
    odd = made.detach() * n
    torch.testing.assert_close(odd, odd.round(), rtol=0, atol=1e-4)
    assert bool((odd.round().abs() % 2 == 1).all())
    assert float(made.detach().abs().max()) == 1.0
    twin = w.detach().clone().requires_grad_()
    smooth = torch.tanh(twin) / torch.tanh(twin).abs().max()
    assert float((made - smooth).detach().abs().max()) <= 1 / n + 1e-6
    upstream = normal(50)
    made.backward(upstream)
    smooth.backward(upstream)
    torch.testing.assert_close(w.grad, twin.grad)
    assert bool(torch.isfinite(dorefa_weight(torch.zeros(3), bits)).all())


def test_dorefa_with_one_bit() -> None:
    w = torch.tensor([0.5, -1.5, 0.0], requires_grad=True)
    made = dorefa_weight(w, 1)
    torch.testing.assert_close(made.detach(), torch.tensor([2.0, -2.0, 2.0]) / 3)
    made.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert w.grad is not None
    assert w.grad.tolist() == [1.0, 2.0, 3.0]


def test_dorefa_activations() -> None:
    x = torch.tensor([-0.5, 0.0, 0.4, 1.0, 1.2], requires_grad=True)
    made = dorefa_activation(x, 2)
    torch.testing.assert_close(made.detach(), torch.tensor([0.0, 0.0, 1 / 3, 1.0, 1.0]))
    made.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_pact() -> None:
    x = torch.tensor([-1.0, 0.4, 1.4, 3.0, 7.0], requires_grad=True)
    ceiling = torch.tensor(3.0, requires_grad=True)
    made = pact(x, ceiling, 2)
    assert made.tolist() == [0.0, 0.0, 1.0, 3.0, 3.0]
    made.backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert x.grad is not None
    assert ceiling.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 0.0, 0.0]
    assert ceiling.grad.item() == 9.0
