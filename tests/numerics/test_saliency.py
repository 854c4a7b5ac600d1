from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersenet.numerics.compensation import least_squares
from tersenet.numerics.saliency import fisher, gradient, l1, l2, lamp, obd, obs, taylor
from tersenet.numerics.second_order import surgeon


def test_magnitudes() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    assert l1(weight).tolist() == [[1.0, 2.0], [0.0, 3.0]]
    assert l2(weight).tolist() == [[1.0, 4.0], [0.0, 9.0]]


def test_lamp_is_what_is_left_of_the_layer_when_the_smaller_are_gone() -> None:
    weight = torch.randn(3, 4, 2, dtype=torch.float64)
    expected = [v * v / sum(u * u for u in weight.flatten().tolist() if abs(u) >= abs(v)) for v in weight.flatten()]
    torch.testing.assert_close(lamp(weight).flatten(), torch.tensor(expected, dtype=torch.float64))
    assert lamp(weight).max() == 1
    assert lamp(torch.tensor([1.0, 1.0, 1.0])).tolist() == pytest.approx([1 / 3, 1 / 2, 1])
    assert lamp(torch.zeros(3)).tolist() == [0, 0, 0]


def test_first_order_is_exact_for_a_linear_loss() -> None:
    """The loss of a sample is x w, so taking w away changes it by |x w|."""
    x, weight = torch.randn(50, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    gradients = x
    change = (x * weight).abs().mean(dim=0)
    torch.testing.assert_close(taylor(weight, gradients.abs().mean(dim=0)), change)
    assert torch.equal(gradient(gradients.abs().mean(dim=0)), x.abs().mean(dim=0))


def quadratic() -> tuple[Tensor, Tensor]:
    """A Hessian, (6, 6), and a weight that its quadratic form has its minimum at."""
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    return root @ root.T + torch.eye(6), torch.randn(6, dtype=torch.float64)


def test_obd_and_obs_are_exact_for_a_quadratic_loss() -> None:
    hessian, weight = quadratic()
    inverse = torch.linalg.inv(hessian)
    for place in range(6):
        alone = weight.clone()
        alone[place] = 0
        change = 0.5 * (alone - weight) @ hessian @ (alone - weight)
        torch.testing.assert_close(obd(weight, hessian.diagonal())[place], change)
        stays = torch.arange(6) != place
        made_up = surgeon(weight, stays, inverse[None])
        change = 0.5 * (made_up - weight) @ hessian @ (made_up - weight)
        torch.testing.assert_close(obs(weight, inverse.diagonal())[place], change)
    assert torch.equal(fisher(weight, hessian.diagonal()), obd(weight, hessian.diagonal()))


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
