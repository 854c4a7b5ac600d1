"""The faster gradient of strided depthwise layers is the gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tersenet.train.depthwise import faster_depthwise


def gradients(layer: nn.Conv2d, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    weights = torch.linspace(0.5, 1.5, y.numel()).view(y.shape)
    (y.float() * weights).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    return y.detach(), x.grad, layer.weight.grad


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (5, 12)])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 5, "stride": 2, "padding": 2, "bias": False},
        {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2)},
        {"kernel_size": 3, "stride": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1, "multiplier": 3},
    ],
)
def test_it_is_that_of_pytorch(settings: dict[str, object], size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    channels = 6
    outputs = channels * int(str(settings.get("multiplier", 1)))
    settings = {key: value for key, value in settings.items() if key != "multiplier"}
    layer = nn.Conv2d(channels, outputs, groups=channels, **settings)  # type: ignore[arg-type]
    x = torch.randn(2, channels, *size).bfloat16().float()
    expected = gradients(copy.deepcopy(layer), x)
    twin = copy.deepcopy(layer)
    with faster_depthwise(twin):
        assert "_conv_forward" in vars(twin)
        found = gradients(twin, x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    assert "_conv_forward" not in vars(twin)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 6, 3, 1, 1, groups=6),
        nn.Conv2d(6, 6, 3, 2, 1, groups=2),
        nn.Conv2d(6, 6, 3, 2, 1, groups=6, padding_mode="reflect"),
        nn.Conv2d(6, 6, 1, 2, 1, groups=6),
    ],
)
def test_other_layers_are_left_alone(layer: nn.Conv2d) -> None:
    with faster_depthwise(layer):
        assert "_conv_forward" not in vars(layer)


def test_without_bf16_the_gradient_is_that_of_pytorch_to_the_bit() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, 2, 1, groups=4)
    x = torch.randn(2, 4, 9, 9)
    expected = layer(x)
    with faster_depthwise(layer):
        assert torch.equal(layer(x), expected)
