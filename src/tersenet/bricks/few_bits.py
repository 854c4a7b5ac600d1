"""Layers whose weights take few values while they are trained: what they share, whatever the rule of the values is.

The layer keeps float weights, from which its rule (bricks/weight_rules.py) makes the values that it computes with in
each forward, with the rule's own gradient. The optimizer updates the float weights, so that small updates add up until
a value moves to the next one: the update of Courbariaux et al., arXiv:1511.00363, section 2.3, and of Jacob et al.,
arXiv:1712.05877, section 3.

    y = gain_o * values(w)_o * x + bias_o

A batch norm behind the layer stays while it is trained. Folding it afterwards multiplies `gain`, one factor per output
channel, and touches neither the float weights nor the values, so it is exact: the whole numbers of the values stay what
they are, and only the scales per channel change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.bricks.brick import Brick
from tersenet.bricks.plain import is_plain
from tersenet.bricks.quantized import BIAS_STEPS, Int8Conv2d, Int8Layer, Int8Linear, hand_over, layer_config
from tersenet.bricks.weight_rules import RULES, Rule


def beside(factor: Tensor, like: Tensor) -> Tensor:
    """(O,) -> (O, 1, ...), to stand beside a weight."""
    return factor.reshape(-1, *(1,) * (like.dim() - 1))


class FewBitLayer(Brick):
    """What convolutions and linear layers of few values share.

    Args:
        rule: one of `weight_rules.RULES`.
        bits: of the values, where the rule has a choice.
        granularity: "channel" or "tensor", what shares the rule's scale, where it has a choice.
        folded: whether a norm was folded in, and so there is a `gain`.
    """

    weight: Any
    bias: Any
    gain: Tensor | None
    settled_kind: type[Int8Layer]
    float_kind: Any

    def __init__(
        self,
        *args: Any,
        rule: str = "lsq",
        bits: int = 4,
        granularity: str = "channel",
        folded: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)  # that of the torch.nn layer
        self.rule_name, self.bits, self.granularity = rule, bits, granularity
        self.rule: Rule = RULES[rule]
        self.rule.prepare(self)
        like: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.register_buffer("gain", torch.ones(len(self.weight), **like) if folded else None)
        self.frozen = False  # its weights stand still; only inside one batch of a training
        self.passing = False  # computes with the float weights; only while ranges are looked for

    @classmethod
    def of(cls, layer: Any, rule: str, bits: int, granularity: str = "channel") -> FewBitLayer:
        """The twin of a torch.nn layer; it takes over the layer's parameters, with their masks."""
        with torch.device("meta"):  # without initial values, because those would be drawn at random
            brick = cls(**layer_config(layer), rule=rule, bits=bits, granularity=granularity)
        brick.to_empty(device=layer.weight.device).to(layer.weight.dtype)
        with torch.no_grad():
            brick.rule.reset(brick)
        return hand_over(layer, brick)

    def config(self) -> dict[str, Any]:
        own = {"rule": self.rule_name, "bits": self.bits, "granularity": self.granularity}
        return {**layer_config(self), **own, "folded": self.gain is not None}

    def start(self) -> None:
        """First numbers of the rule, from the float weights."""
        with torch.no_grad():
            self.rule.start(self)

    def rounded_weight(self) -> Tensor:
        """(O, ...): the values times the gain."""
        values = self.weight if self.passing else self.rule.values(self)
        if self.frozen:
            values = values.detach()
        return values if self.gain is None else values * beside(self.gain, values)

    def absorb(self, factor: Tensor, shift: Tensor) -> None:
        """Takes over factor (O,) and shift (O,), float64, of a norm behind: y' = factor y + shift."""
        kind = self.weight.dtype
        gain = torch.ones_like(factor) if self.gain is None else self.gain.double()
        bias = torch.zeros_like(factor) if self.bias is None else self.bias.detach().double()
        self.gain = (gain * factor).to(kind)
        self.bias = nn.Parameter((bias * factor + shift).to(kind))

    @torch.no_grad()
    def settled(self, input_scale: Tensor | None) -> nn.Module:
        """The layer without its rule: whole numbers where the values are multiples of a scale, else float weights.

        Args:
            input_scale: () scale of the quantizer in front, or None where the input is float. With it the bias becomes
                an int32, as in the other integer layers.
        """
        found = self.rule.integers(self)
        if found is None:
            return self._floating()
        steps, scale = found  # (O, ...) whole numbers, (O,)
        if self.gain is not None:  # a negative factor turns the signs, because scales are positive
            steps = steps * beside(torch.where(self.gain < 0, -1.0, 1.0).to(steps.dtype), steps)
            scale = scale * self.gain.abs()
        least = torch.full_like(scale, torch.finfo(scale.dtype).tiny)
        if input_scale is not None and self.bias is not None:
            steps, scale = _finer(steps, scale)
            # A channel with a tiny factor has a tiny scale, in which the bias would be a huge integer.
            least = torch.maximum(least, self.bias.abs() / (input_scale.abs() * BIAS_STEPS))
        coarse = torch.maximum(scale, least)
        steps = torch.where(beside(coarse > scale, steps), torch.round(steps * beside(scale / coarse, steps)), steps)
        with torch.device("meta"):
            brick = self.settled_kind(**layer_config(self), input_quantized=input_scale is not None)
        brick.weight = steps.to(torch.int8)
        brick.weight_scale = coarse.clone()
        brick.bias = None if self.bias is None else self.bias.detach().clone()
        if input_scale is not None:
            brick.input_scale = input_scale.detach().abs().clone()
            if self.bias is not None:
                whole = torch.round(self.bias / brick.bias_scale).double().clamp(-(2**31), 2**31 - 1)
                brick.bias = whole.to(torch.int32)
        return brick.train(self.training)

    def _floating(self) -> nn.Module:
        with torch.device("meta"):
            layer = self.float_kind(**layer_config(self))
        layer.weight = nn.Parameter(self.rounded_weight().clone())
        layer.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return layer.train(self.training)


def _finer(steps: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same values as larger whole numbers of a smaller scale, by the largest power of two that int8 has room for.

    The runtimes round a bias to whole products of input step and weight step, which of few bits are coarse beside the
    step of an 8-bit output.
    """
    largest = max(1, int(steps.abs().max()))
    times = 2.0 ** ((127 // largest).bit_length() - 1)
    return steps * times, scale / times


class FewBitConv2d(FewBitLayer, nn.Conv2d):
    """A convolution with few values: (N, I, H, W) -> (N, O, H, W)."""

    settled_kind = Int8Conv2d
    float_kind = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.rounded_weight(), self.bias)


class FewBitLinear(FewBitLayer, nn.Linear):
    """A linear layer with few values: (..., I) -> (..., O)."""

    settled_kind = Int8Linear
    float_kind = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rounded_weight(), self.bias)


def few_bit_kind(layer: nn.Module) -> type[FewBitConv2d] | type[FewBitLinear] | None:
    """The twin of a float layer's type, or None where there is none."""
    if not is_plain(layer) or (isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros"):
        return None
    if isinstance(layer, nn.Conv2d):
        return FewBitConv2d
    return FewBitLinear if isinstance(layer, nn.Linear) else None
