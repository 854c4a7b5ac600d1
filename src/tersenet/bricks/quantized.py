"""Convolutions and linear layers with integer weights: trainable (`Quantized...`) and settled (`Int8...`).

A quantized layer keeps float weights and rounds them in each forward, with a straight-through gradient, so it can be
trained. A settled layer holds the integers themselves and computes with `weight * scale`: plain operators, equal
results. Both are the torch.nn layers of the same kind, with the same names for everything.

The bias is an int32 with scale input_scale * weight_scale, as in Jacob et al., arXiv:1712.05877, section 2.4, and in
the runtimes; where the input is not quantized (`input_quantized=False`: weights only) it stays float.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from tersenet.bricks.brick import Brick
from tersenet.bricks.plain import is_plain
from tersenet.numerics.rounding import dequantize, fake_quantize, quantize

# Before calibration a bias is rounded this finely, which is not at all in float32.
UNSET = 2.0**-40
# A bias beyond this many steps would come near to the ends of int32.
BIAS_STEPS = 2.0**30


def _channels(scale: Tensor, like: Tensor) -> Tensor:
    """(O,) -> (O, 1, ...), to stand beside a weight."""
    return scale.reshape(-1, *(1,) * (like.dim() - 1))


class ScaledLayer(Brick):
    """What trainable and settled layers share.

    Buffers: weight_scale (O,), and input_scale (), which is the scale of the quantizer in front (None: not quantized).
    """

    weight: Any
    bias: Any
    weight_scale: Tensor
    input_scale: Tensor | None
    input_quantized: bool

    def config(self) -> dict[str, Any]:
        return {**layer_config(self), "input_quantized": self.input_quantized}

    @property
    def bias_scale(self) -> Tensor:
        """(O,): the scale of the integer bias. Only where the input is quantized."""
        assert self.input_scale is not None
        return self.input_scale * self.weight_scale


class QuantizedLayer(ScaledLayer):
    """What quantized layers share: float parameters, and their rounding.

    Args:
        bits: of the weights, 2 to 8, around zero. Fewer than 8 are computed with as int8 are.
    """

    settled_kind: type[Int8Layer]

    def __init__(self, *args: Any, input_quantized: bool = True, bits: int = 8, **options: Any) -> None:
        super().__init__(*args, **options)  # that of the torch.nn layer
        self.input_quantized = input_quantized
        self.bits = bits
        self.high = 2 ** (bits - 1) - 1
        like: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.register_buffer("weight_scale", torch.ones(len(self.weight), **like))
        self.register_buffer("input_scale", torch.full((), UNSET, **like) if input_quantized else None)

    @classmethod
    def of(cls, layer: Any, input_quantized: bool = True, bits: int = 8) -> QuantizedLayer:
        """The quantized twin of a torch.nn layer; it takes over the layer's parameters and parametrizations."""
        with torch.device("meta"):
            brick = cls(**layer_config(layer), input_quantized=input_quantized, bits=bits)
        device, dtype = layer.weight.device, layer.weight.dtype
        brick.weight_scale = torch.ones(len(layer.weight), device=device, dtype=dtype)
        if input_quantized:
            brick.input_scale = torch.full((), UNSET, device=device, dtype=dtype)
        return hand_over(layer, brick)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "bits": self.bits}

    def unquantized(self) -> nn.Module:
        """The inverse of `of`: the torch.nn layer with the float weights, which the brick still has."""
        kind: Any = nn.Conv2d if isinstance(self, nn.Conv2d) else nn.Linear
        with torch.device("meta"):
            layer = kind(**layer_config(self))
        return hand_over(self, layer)

    def rounded_weight(self) -> Tensor:
        """(O, ...): the weight as the runtime sees it."""
        return fake_quantize(self.weight, _channels(self.weight_scale, self.weight), 0, -self.high, self.high)

    def rounded_bias(self) -> Tensor | None:
        """(O,): the bias as the runtime sees it. Calibration keeps it far inside of int32; nothing is cut off here."""
        if self.bias is None or self.input_scale is None:
            return self.bias
        return fake_quantize(self.bias, self.bias_scale, 0, -math.inf, math.inf)

    def settled(self) -> Int8Layer:
        """The same layer with its integers as buffers; equal outputs, no longer trainable."""
        with torch.device("meta"):
            brick = self.settled_kind(**super().config())
        scale = _channels(self.weight_scale, self.weight)
        with torch.no_grad():
            brick.weight = quantize(self.weight, scale, 0, -self.high, self.high).to(torch.int8)
            brick.weight_scale = self.weight_scale.clone()
            if self.input_scale is None:
                brick.bias = None if self.bias is None else self.bias.detach().clone()
            else:
                brick.input_scale = self.input_scale.clone()
                if self.bias is not None:
                    # float64, because float32 has no 2^31 - 1; the values are those that float32 gave.
                    steps = torch.round(self.bias / self.bias_scale).double().clamp(-(2**31), 2**31 - 1)
                    brick.bias = steps.to(torch.int32)
        return brick.train(self.training)


class Int8Layer(ScaledLayer):
    """What settled layers share: weight (O, ...) int8, bias (O,) int32 or, where the input is not quantized, float."""

    def __init__(self, *args: Any, input_quantized: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)  # that of the torch.nn layer
        self.input_quantized = input_quantized
        shape, device = self.weight.shape, self.weight.device
        has_bias = self.bias is not None
        del self.weight, self.bias
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8, device=device))
        dtype = torch.int32 if input_quantized else torch.float32
        self.register_buffer("bias", torch.zeros(shape[0], dtype=dtype, device=device) if has_bias else None)
        self.register_buffer("weight_scale", torch.ones(shape[0], device=device))
        self.register_buffer("input_scale", torch.ones((), device=device) if input_quantized else None)

    def rounded_weight(self) -> Tensor:
        """(O, ...): weight * scale."""
        return dequantize(self.weight.to(self.weight_scale.dtype), _channels(self.weight_scale, self.weight), 0)

    def rounded_bias(self) -> Tensor | None:
        """(O,): bias * scale, or the float bias."""
        if self.bias is None or self.input_scale is None:
            return self.bias
        return dequantize(self.bias.to(self.weight_scale.dtype), self.bias_scale, 0)


class Int8Conv2d(Int8Layer, nn.Conv2d):
    """A convolution that holds int8 weights: (N, I, H, W) -> (N, O, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.rounded_weight(), self.rounded_bias())


class Int8Linear(Int8Layer, nn.Linear):
    """A linear layer that holds int8 weights: (..., I) -> (..., O)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rounded_weight(), self.rounded_bias())


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """A convolution that computes with rounded weights: (N, I, H, W) -> (N, O, H, W)."""

    settled_kind = Int8Conv2d

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.rounded_weight(), self.rounded_bias())


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """A linear layer that computes with rounded weights: (..., I) -> (..., O)."""

    settled_kind = Int8Linear

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rounded_weight(), self.rounded_bias())


def hand_over(source: Any, target: Any) -> Any:
    """Gives a twin the parameters of a layer, with their parametrizations, and its mode."""
    if parametrize.is_parametrized(source):
        target.weight, target.bias = nn.Parameter(torch.empty_like(source.weight)), source.bias
        parametrize.transfer_parametrizations_and_params(source, target)
    else:
        target.weight, target.bias = source.weight, source.bias
    return target.train(source.training)


def layer_config(layer: Any) -> dict[str, Any]:
    """What builds a layer of this shape, under torch.nn's names."""
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features, "bias": bias}
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    values = {name: getattr(layer, name) for name in names}
    return {**{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}, "bias": bias}


def quantized_kind(layer: nn.Module) -> type[QuantizedLayer] | None:
    """The quantized twin of a float layer's type, or None where there is none."""
    if not is_plain(layer):
        return None
    if isinstance(layer, nn.Conv2d):
        return QuantizedConv2d
    return QuantizedLinear if isinstance(layer, nn.Linear) else None


def identity_convolution(channels: int, before: int, after: int, stride: int) -> nn.Conv2d:
    """A 1x1 convolution that does what `PadShortcut` does, exactly, in float as in int8 (its weights are 0 and 1).

    Runtimes have int8 kernels for it and none for a strided slice, so the network stays in integers.
    """
    # Not initialised, because that would draw from the user's random numbers.
    layer = nn.utils.skip_init(nn.Conv2d, channels, before + channels + after, 1, stride=stride, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[before : before + channels, :, 0, 0] = torch.eye(channels)
    return layer.requires_grad_(False)
