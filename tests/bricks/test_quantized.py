"""Quantized bricks against float twins that were given the rounded numbers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tersenet.bricks.quantized import Int8Layer, QuantizedLayer, identity_convolution, quantized_kind
from tersenet.bricks.quantizer import Quantizer
from tersenet.bricks.shortcut import PadShortcut
from tersenet.numerics.ranges import weight_scales

LAYERS = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8)),
    "no bias": (lambda: nn.Conv2d(4, 6, (3, 1), dilation=2, bias=False), (2, 4, 8, 8)),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 8, 8)),
    "linear": (lambda: nn.Linear(5, 3), (2, 5)),
}
CASES = [(name, inputs) for name in LAYERS for inputs in (True, False)]


def made(name: str, input_quantized: bool) -> tuple[nn.Module, QuantizedLayer, torch.Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[name][0]()
    kind = quantized_kind(layer)
    assert kind is not None
    brick = kind.of(layer, input_quantized=input_quantized)
    brick.weight_scale.copy_(weight_scales(layer.weight))
    if brick.input_scale is not None:
        brick.input_scale.fill_(0.013)
    return layer, brick, torch.randn(LAYERS[name][1])


@pytest.mark.parametrize(("name", "inputs"), CASES)
def test_like_a_float_layer_with_the_rounded_numbers(name: str, inputs: bool) -> None:
    layer, brick, x = made(name, inputs)
    with torch.no_grad():
        beside = brick.weight_scale.reshape(-1, *(1,) * (layer.weight.dim() - 1))
        weight = torch.round(layer.weight / beside).clamp(-127, 127) * beside
        assert 0 < float((weight - layer.weight).abs().max()) < 0.5 * float(brick.weight_scale.max()) + 0.01
        bias = layer.bias
        if bias is not None and inputs:
            bias = torch.round(bias / (0.013 * brick.weight_scale)) * (0.013 * brick.weight_scale)
        twin = LAYERS[name][0]()
        twin.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias})})
        torch.testing.assert_close(brick(x), twin(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "inputs"), CASES)
def test_settled_outputs_are_equal_and_integers(name: str, inputs: bool) -> None:
    _, brick, x = made(name, inputs)
    settled = brick.settled()
    assert isinstance(settled, Int8Layer)
    assert settled.weight.dtype == torch.int8
    assert settled.bias is None or settled.bias.dtype == (torch.int32 if inputs else torch.float32)
    assert not list(settled.parameters())
    assert torch.equal(settled(x), brick(x))


@pytest.mark.parametrize(("name", "inputs"), CASES)
def test_config_and_state_dict_rebuild(name: str, inputs: bool) -> None:
    layer, brick, x = made(name, inputs)
    for one in (brick, brick.settled()):
        again = type(one)(**json.loads(json.dumps(one.config())))
        again.load_state_dict(one.state_dict())
        assert torch.equal(again(x), one(x))
        for attribute in ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "in_features"):
            assert getattr(again, attribute, None) == getattr(layer, attribute, None)


def test_gradients_reach_weight_bias_and_input_and_scales_stay() -> None:
    _, brick, x = made("conv", True)
    before = brick.weight_scale.clone()
    optimizer = torch.optim.SGD(brick.parameters(), lr=0.1)
    x.requires_grad_()
    brick(x).square().mean().backward()
    optimizer.step()
    assert x.grad is not None
    assert float(x.grad.abs().max()) > 0
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in brick.parameters())
    assert torch.equal(brick.weight_scale, before)


def test_a_mask_stays_attached() -> None:
    class Half(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return w * (torch.arange(w.numel()).reshape(w.shape) % 2)

    layer = nn.Conv2d(2, 2, 3)
    original = layer.weight
    nn.utils.parametrize.register_parametrization(layer, "weight", Half())
    kind = quantized_kind(layer)
    assert kind is not None
    brick = kind.of(layer)
    assert isinstance(brick, QuantizedLayer)
    assert "parametrizations.weight.original" in brick.state_dict()
    assert torch.equal(brick.parametrizations.weight.original, original)
    brick.weight_scale.copy_(weight_scales(brick.weight))
    rounded = brick.rounded_weight().detach().flatten()
    assert not bool(rounded[::2].any())
    assert bool(rounded[1::2].any())


@pytest.mark.parametrize(("channels", "before", "after", "stride"), [(4, 2, 2, 2), (3, 0, 1, 1), (2, 1, 0, 3)])
def test_the_identity_convolution_is_the_shortcut(channels: int, before: int, after: int, stride: int) -> None:
    x = torch.randn(2, channels, 9, 9)
    layer = identity_convolution(channels, before, after, stride)
    expected = PadShortcut(stride, before, after)(x)
    assert torch.equal(layer(x), expected)
    kind = quantized_kind(layer)
    assert kind is not None
    brick = kind.of(layer)
    brick.weight_scale.copy_(weight_scales(layer.weight))
    assert torch.equal(brick(x), expected)
    assert torch.equal(brick.settled()(x), expected)


def test_quantizer_rounds_and_shows_values_to_its_observer() -> None:
    quantizer = Quantizer()
    quantizer.scale.fill_(0.5)
    quantizer.zero_point.fill_(2)
    x = torch.tensor([-5.0, -0.8, 0.3, 0.74, 1000.0])
    assert quantizer(x).tolist() == [-1.0, -1.0, 0.5, 0.5, 126.5]
    seen: list[torch.Tensor] = []
    quantizer.observer = seen.append
    assert torch.equal(quantizer(x), x)
    assert torch.equal(seen[0], x)
    again = Quantizer(**quantizer.config())
    again.load_state_dict(quantizer.state_dict())
    assert again(x).tolist() == [-1.0, -1.0, 0.5, 0.5, 126.5]
