"""Signs are exact; their gradients are those of the functions that the papers put in their place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tersenet.numerics.sign_gradients import (
    clipped_sign,
    magnitude_aware,
    polynomial_sign,
    shifted_prelu,
    shifted_sign,
)

X = torch.tensor([-3.0, -1.0, -0.6, -0.0, 0.0, 0.3, 0.99, 1.01])


def stand_in(x: Tensor) -> Tensor:
    """Bi-Real's piecewise polynomial, equation 6."""
    middle = torch.where(x < 0, 2 * x + x * x, 2 * x - x * x)
    return torch.where(x < -1, -1.0, torch.where(x < 1, middle, 1.0))


@pytest.mark.parametrize(("sign", "smooth"), [(clipped_sign, lambda x: x.clamp(-1, 1)), (polynomial_sign, stand_in)])
def test_gradients(sign: Callable[[Tensor], Tensor], smooth: Callable[[Tensor], Tensor]) -> None:
    x, twin = X.clone().requires_grad_(), X.clone().requires_grad_()
    y = sign(x)
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
    assert torch.equal(sign(X), y)
    upstream = torch.arange(1.0, 9.0)
    y.backward(upstream)
    smooth(twin).backward(upstream)
    torch.testing.assert_close(x.grad, twin.grad)


def test_the_shift_is_per_channel_and_trains() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    shift = torch.tensor([0.0, 0.5, -0.5], requires_grad=True)
    y = shifted_sign(x, shift)
    for c in range(3):
        assert torch.equal(y[:, c] > 0, x[:, c] >= shift[c])
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(shift.grad, -x.grad.sum(dim=(0, 2, 3)))


def test_the_shifted_prelu() -> None:
    x = torch.tensor([[[-1.0, 1.0]], [[0.0, 3.0]]]).movedim(2, 1)  # (2, 2, 1)
    made = shifted_prelu(x, torch.tensor([0.5, 2.0]), torch.tensor([10.0, 20.0]), torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(made[:, :, 0], torch.tensor([[9.85, 19.8], [9.95, 21.0]]))


def test_binary_weights_keep_their_size() -> None:
    weight = torch.tensor([[0.5, -1.5], [0.1, 0.3]], requires_grad=True)
    made = magnitude_aware(weight)
    torch.testing.assert_close(made, torch.tensor([[1.0, -1.0], [0.2, 0.2]]))
    made.sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[1.0, 0.0], [0.2, 0.2]]))
