"""The rules by which a layer of few values makes them from its float weights.

A rule is a set of functions of the layer; what it learns or keeps lies in the layer, under the names given here, with
one number per output channel or one for all. The arithmetic and the gradients are in numerics/.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersenet.numerics.binary import binary_scale, signs
from tersenet.numerics.ranges import weight_scales
from tersenet.numerics.rounding import grid
from tersenet.numerics.sign_gradients import clipped_sign, magnitude_aware
from tersenet.numerics.straight_through import dorefa_weight, lsq, lsq_factor
from tersenet.numerics.ternary import signs_beyond, ttq, ttq_start, twn_exact, twn_rule


class Rule:
    """What every rule says. The base class is for rules without numbers of their own."""

    least_bits, most_bits = 1, 8

    def prepare(self, layer: Any) -> None:
        """Registers the rule's parameters and buffers, with placeholders."""

    def reset(self, layer: Any) -> None:
        """The placeholders again, in a layer that was made without initial values."""

    def start(self, layer: Any) -> None:
        """First numbers, from the float weights."""

    def values(self, layer: Any) -> Tensor:
        """(O, ...): what the layer computes with, with the rule's gradient."""
        raise TypeError(f"{type(self).__name__} makes no values; every rule must")

    def integers(self, layer: Any) -> tuple[Tensor, Tensor] | None:
        """(O, ...) whole numbers of at most 127 and (O,) positive scales whose products are the values; None where
        there are no such numbers."""
        return None


def _rows(number: Tensor, like: Tensor) -> Tensor:
    """(O,) or (1,) -> (O, 1, ...) or (1, 1, ...)."""
    return number.reshape(-1, *(1,) * (like.dim() - 1))


class LearnedStep(Rule):
    """LSQ (arXiv:1902.08153): w on a grid of 2^bits whole multiples of a step s that is trained with the weights.

    y = clamp(round(w / s), -2^(b-1), 2^(b-1) - 1) s. Gradients: dy/dw = 1 inside of the grid, else 0; dy/ds =
    round(w / s) - w / s inside, the grid's end outside, summed and times 1 / sqrt(n 2^(b-1)), n weights per step.
    Departures: one step per output channel unless "tensor" is asked for, and it begins where the squared error of
    rounding is least. At 8 bits the lowest value is left out, as in all of our 8-bit weights.
    """

    least_bits, most_bits = 2, 8

    def prepare(self, layer: Any) -> None:
        count = 1 if layer.granularity == "tensor" else len(layer.weight)
        layer.step = nn.Parameter(torch.ones(count, device=layer.weight.device))

    def reset(self, layer: Any) -> None:
        layer.step.data.fill_(1.0)

    def start(self, layer: Any) -> None:
        weight = layer.weight.detach()
        shared = weight.reshape(1, -1) if len(layer.step) == 1 else weight
        layer.step.copy_(weight_scales(shared, layer.bits))

    def values(self, layer: Any) -> Tensor:
        weight, low, high = layer.weight, *self._grid(layer)
        factor = lsq_factor(weight.numel() // len(layer.step), high)
        return lsq(weight, _rows(layer.step.abs(), weight), 0, low, high, factor)

    def integers(self, layer: Any) -> tuple[Tensor, Tensor]:
        step = layer.step.detach().abs()
        steps = torch.clamp(torch.round(layer.weight.detach() / _rows(step, layer.weight)), *self._grid(layer))
        return steps, step.expand(len(layer.weight))

    @staticmethod
    def _grid(layer: Any) -> tuple[int, int]:
        return grid(layer.bits, signed=True, full=layer.bits < 8)


class DoReFa(Rule):
    """DoReFa (arXiv:1606.06160): w squeezed by tanh and rounded to odd multiples of 1 / (2^b - 1), times an amplitude.

    y = a (2 round(n u) / n - 1), u = tanh(w) / (2 max |tanh(w)|) + 1/2, n = 2^b - 1; gradient as in
    `straight_through.dorefa_weight`. Departure: the paper has a = 1 and trains from scratch; here a, one per output
    channel, is fixed where the error to the trained weights is least, so that a trained network can go on.
    """

    least_bits, most_bits = 2, 7

    def prepare(self, layer: Any) -> None:
        layer.register_buffer("amplitude", torch.ones(len(layer.weight), device=layer.weight.device))

    def reset(self, layer: Any) -> None:
        layer.amplitude.fill_(1.0)

    def start(self, layer: Any) -> None:
        weight = layer.weight.detach()
        rows, values = weight.flatten(1), dorefa_weight(weight, layer.bits).flatten(1)
        fitted = (rows * values).sum(dim=1) / values.square().sum(dim=1)
        layer.amplitude.copy_(fitted.clamp(min=1e-3 * float(fitted.abs().max().clamp(min=1e-12))))

    def values(self, layer: Any) -> Tensor:
        return dorefa_weight(layer.weight, layer.bits) * _rows(layer.amplitude, layer.weight)

    def integers(self, layer: Any) -> tuple[Tensor, Tensor]:
        top = 2**layer.bits - 1
        return torch.round(dorefa_weight(layer.weight.detach(), layer.bits) * top), layer.amplitude / top


class Ternary(Rule):
    """TWN (arXiv:1605.04711): y = a sign(w) where |w| > t, else 0; a is the mean magnitude beyond t = 0.7 mean |w|.

    Threshold and scale follow the float weights in each forward, one pair per output channel or per layer ("tensor",
    the paper's). Gradient: dy/dw = 1, as in the paper's algorithm 1 (the scale is taken for a constant).
    """

    def values(self, layer: Any) -> Tensor:
        return _through(layer.weight, self._found(layer, twn_rule)[0])

    def integers(self, layer: Any) -> tuple[Tensor, Tensor]:
        _, steps, scale = self._found(layer, twn_rule)
        return steps, torch.where(scale > 0, scale, torch.ones_like(scale)).expand(len(steps))

    def _found(self, layer: Any, how: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Values, signs with zeros, (O,) or (1,) scales."""
        weight = layer.weight.detach()
        threshold, scale = how(weight.reshape(1, -1) if layer.granularity == "tensor" else weight)
        steps = signs_beyond(weight, _rows(threshold, weight))
        return steps * _rows(scale, weight), steps, scale


class TernaryExact(Ternary):
    """As TWN, with the threshold of least squared error found by sorting instead of the rule of 0.7."""

    def values(self, layer: Any) -> Tensor:
        return _through(layer.weight, self._found(layer, twn_exact)[0])

    def integers(self, layer: Any) -> tuple[Tensor, Tensor]:
        _, steps, scale = self._found(layer, twn_exact)
        return steps, torch.where(scale > 0, scale, torch.ones_like(scale)).expand(len(steps))


class TrainedTernary(Rule):
    """TTQ (arXiv:1612.01064): y = p where w > t, -n where w < -t, else 0; p and n are trained, t = 0.05 max |w|.

    One pair of scales per layer. Gradients as in `ternary.ttq`. Departures, for weights that keep the size of a trained
    network: they get dL/dy times p / m, 1 or n / m with m = (p + n) / 2, where the paper has p, 1 or n, and the scales
    the sum of what they stand in times 1 / sqrt(weights of the layer), where the paper has 1.
    """

    def prepare(self, layer: Any) -> None:
        for name in ("positive", "negative"):
            setattr(layer, name, nn.Parameter(torch.ones((), device=layer.weight.device)))

    def reset(self, layer: Any) -> None:
        layer.positive.data.fill_(1.0)
        layer.negative.data.fill_(1.0)

    def start(self, layer: Any) -> None:
        positive, negative, _ = ttq_start(layer.weight)
        layer.positive.copy_(positive)
        layer.negative.copy_(negative)

    def values(self, layer: Any) -> Tensor:
        weight = layer.weight
        positive, negative = layer.positive.abs(), layer.negative.abs()
        unit = (positive + negative).detach() / 2
        return ttq(weight, positive, negative, 0.05 * weight.detach().abs().max(), unit, weight.numel() ** -0.5)


class Signs(Rule):
    """BNN (arXiv:1602.02830): y = sign(w), no scale. dy/dw = 1 where |w| <= 1, else 0."""

    def values(self, layer: Any) -> Tensor:
        return clipped_sign(layer.weight)

    def integers(self, layer: Any) -> tuple[Tensor, Tensor]:
        weight = layer.weight.detach()
        return signs(weight), torch.ones(len(weight), device=weight.device, dtype=weight.dtype)


class ScaledSigns(Rule):
    """BWN, the weights of XNOR-Net (arXiv:1603.05279): y = a sign(w), a the mean |w| of the output channel.

    Gradient (the paper's section 3.1): dL/dw = dL/dy a 1[|w| <= 1] + sign(w) / n sum(dL/dy sign(w)), n weights in the
    channel; the second part is the true gradient of a.
    """

    def values(self, layer: Any) -> Tensor:
        return clipped_sign(layer.weight) * _rows(binary_scale(layer.weight), layer.weight)

    def integers(self, layer: Any) -> tuple[Tensor, Tensor]:
        weight = layer.weight.detach()
        scale = binary_scale(weight)
        alive = (scale > 0).to(weight.dtype)  # a channel of zeros stays one: its scale is 0
        return signs(weight) * _rows(alive, weight), torch.where(scale > 0, scale, torch.ones_like(scale))


class MagnitudeAware(ScaledSigns):
    """Bi-Real Net's and ReActNet's weights (arXiv:1808.00278): as BWN, with the scale taken for a constant."""

    def values(self, layer: Any) -> Tensor:
        return magnitude_aware(layer.weight)


class Real(Rule):
    """The float weights themselves: the first stage of a binary training, in which only activations are binary."""

    def values(self, layer: Any) -> Tensor:
        return layer.weight


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _through(weight: Tensor, values: Tensor) -> Tensor:
    """The values, with the gradient going to the weights as it is."""
    return _Through.apply(weight, values) if torch.is_grad_enabled() and weight.requires_grad else values


RULES: dict[str, Rule] = {
    "lsq": LearnedStep(),
    "dorefa": DoReFa(),
    "twn": Ternary(),
    "twn_exact": TernaryExact(),
    "ttq": TrainedTernary(),
    "bnn": Signs(),
    "bwn": ScaledSigns(),
    "magnitude_aware": MagnitudeAware(),
    "real": Real(),
}
