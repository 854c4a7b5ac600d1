"""Places whose values are no measure of a range: paddings with infinity, and sums that cancel."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.bricks.quantizer import Quantizer
from tersenet.errors import ModelError
from tersenet.numerics.straight_through import lsq
from tersenet.quantization.observe import _without
from tersenet.quantization.quantize import Quantize
from tersenet.task import Task

X = torch.randn(16, 3, 9, 9, generator=torch.Generator().manual_seed(0))
TASK = Task(example=X[:2], calibrate=[X], quiet=True)


class Padded(nn.Module):
    """A maximum that does not see the edge, as in networks that came from TensorFlow."""

    def __init__(self, value: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.value = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), value

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.first(x), (0, 1, 0, 1), value=self.value)
        return self.second(F.max_pool2d(x, 3, 2))


class Cancelled(nn.Module):
    """The mean over a norm is nothing but rounding errors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).mean((2, 3)))


@pytest.mark.parametrize("ranges", ["mse", "minmax", "percentile", "divergence"])
def test_a_padding_with_infinity_does_not_count(ranges: str) -> None:
    model = Padded(-torch.inf).eval()
    quantized, _ = Quantize(ranges=ranges).run(copy.deepcopy(model), TASK)
    with torch.no_grad():
        error = (quantized(X) - model(X)).abs().max()
        assert error < 0.05 * model(X).abs().max()
        assert torch.isfinite(quantized(X)).all()


def test_only_what_was_padded_is_passed_over() -> None:
    seen: list[Tensor] = []
    _without(-torch.inf, seen.append, torch.tensor([1.0, -torch.inf, torch.inf, torch.nan]))
    torch.testing.assert_close(seen[0], torch.tensor([1.0, 0.0, torch.inf, torch.nan]), equal_nan=True)


def test_infinity_that_is_computed_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    with pytest.raises(ModelError, match="not finite during calibration"):
        Quantize().run(model, TASK)


def test_a_learned_step_has_a_gradient_beside_infinity() -> None:
    x = torch.tensor([[0.3, 0.7, -1.2]])
    gradients = []
    for given in (x, torch.cat([x, torch.tensor([[-torch.inf]])], 1)):
        scale = torch.tensor(0.5, requires_grad=True)
        y = lsq(given, scale, 0, -2, 1, 1.0)
        y[:, :3].sum().backward()
        gradients.append(float(scale.grad))
    assert gradients[0] == gradients[1]


def test_what_cancels_takes_the_grid_of_what_was_added_up() -> None:
    model = Cancelled().eval()
    with torch.no_grad():
        assert model.norm(model.first(X)).mean((2, 3)).abs().max() < 1e-5
    quantized, _ = Quantize().run(copy.deepcopy(model), TASK)
    scales = {path: float(each.scale) for path, each in quantized.named_modules() if isinstance(each, Quantizer)}
    assert min(scales.values()) > 1e-3, scales


@pytest.mark.parametrize("weight", [0.0, 1e-41, 1e-37, 1e-25, 1e-16])
@pytest.mark.parametrize("bias", [0.0, 0.5, 1e-30])
def test_a_channel_of_hardly_any_weights_gives_its_bias(weight: float, bias: float) -> None:
    """As folded batch norms leave the channels that a training has switched off."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    with torch.no_grad():
        model[0].weight[1].fill_(weight)
        model[0].bias[1] = bias  # type: ignore[index]
        quantized, _ = Quantize().run(copy.deepcopy(model), TASK)
        error = (quantized(X) - model(X)).abs().max()
        assert error < 0.05 * model(X).abs().max()
