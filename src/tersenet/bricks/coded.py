"""Convolutions and linear layers whose weights are stored in few bits: trainable (`Rounded...`), settled (`Stored...`).

For weights alone: inputs, outputs and bias stay float, so that any kind of storage will do (bricks/codes.py). A
rounded layer keeps float weights and rounds them in each forward, with a straight-through gradient; a stored layer
holds the codes and makes weights of them in each forward, with equal results: smaller, not faster. Layers for integer
arithmetic are in bricks/quantized.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.bricks.brick import Brick
from tersenet.bricks.codes import CODES, Code, make_code
from tersenet.bricks.plain import is_plain
from tersenet.bricks.quantized import hand_over, layer_config


class CodedLayer(Brick):
    """What rounded and stored layers share: the layer's own settings beside those of its code."""

    code: Code
    weight: Any
    bias: Any

    def __init__(self, *args: Any, code: str, **options: Any) -> None:
        names = CODES[code].names if code in CODES else ()
        settings = {name: options.pop(name) for name in names if name in options}
        super().__init__(*args, **options)  # that of the torch.nn layer
        self.code = make_code(code, self.weight.shape, settings)

    def config(self) -> dict[str, Any]:
        return {**layer_config(self), "code": self.code.kind, **self.code.settings()}

    def _compute(self, x: Tensor, weight: Tensor) -> Tensor:
        if isinstance(self, nn.Conv2d):
            return self._conv_forward(x, weight, self.bias)
        return F.linear(x, weight, self.bias)


class RoundedLayer(CodedLayer):
    """What rounded layers share: float parameters, and their rounding."""

    stored_kind: type[StoredLayer]

    @classmethod
    def of(cls, layer: Any, code: str, settings: dict[str, Any]) -> RoundedLayer:
        """The rounded twin of a torch.nn layer; it takes over the layer's parameters and parametrizations."""
        with torch.device("meta"):
            brick = cls(**layer_config(layer), code=code, **settings)
        brick.code = make_code(code, layer.weight.shape, settings).to(layer.weight.device)
        return hand_over(layer, brick)

    def unquantized(self) -> nn.Module:
        """The inverse of `of`: the torch.nn layer with the float weights, which the brick still has."""
        kind: Any = nn.Conv2d if isinstance(self, nn.Conv2d) else nn.Linear
        with torch.device("meta"):
            layer = kind(**layer_config(self))
        return hand_over(self, layer)

    def rounded_weight(self) -> Tensor:
        """(O, ...): the weight as it will be stored."""
        return self.code.round(self.weight)

    def settled(self) -> StoredLayer:
        """The same layer with its codes as buffers; equal outputs, no longer trainable."""
        with torch.device("meta"):
            brick = self.stored_kind(**self.config())
        with torch.no_grad():
            brick.codes = self.code.encode(self.weight).clone()
            brick.bias = None if self.bias is None else self.bias.detach().clone()
        brick.code = make_code(self.code.kind, self.weight.shape, self.code.settings()).to(self.weight.device)
        brick.code.load_state_dict(self.code.state_dict())
        return brick.train(self.training)


class StoredLayer(CodedLayer):
    """What stored layers share. Buffers: codes, bias (O,) float, and those of the code."""

    codes: Tensor

    def __init__(self, *args: Any, code: str, **options: Any) -> None:
        super().__init__(*args, code=code, **options)
        weight, has_bias = self.weight, self.bias is not None
        del self.weight, self.bias
        self.register_buffer("codes", self.code.empty().to(weight.device))
        bias = torch.zeros(len(weight), device=weight.device) if has_bias else None
        self.register_buffer("bias", bias)

    def rounded_weight(self) -> Tensor:
        """(O, ...): the weights of the codes."""
        return self.code.decode(self.codes)


class StoredConv2d(StoredLayer, nn.Conv2d):
    """A convolution that holds codes: (N, I, H, W) -> (N, O, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return self._compute(x, self.rounded_weight())


class StoredLinear(StoredLayer, nn.Linear):
    """A linear layer that holds codes: (..., I) -> (..., O)."""

    def forward(self, x: Tensor) -> Tensor:
        return self._compute(x, self.rounded_weight())


class RoundedConv2d(RoundedLayer, nn.Conv2d):
    """A convolution that computes with rounded weights: (N, I, H, W) -> (N, O, H, W)."""

    stored_kind = StoredConv2d

    def forward(self, x: Tensor) -> Tensor:
        return self._compute(x, self.rounded_weight())


class RoundedLinear(RoundedLayer, nn.Linear):
    """A linear layer that computes with rounded weights: (..., I) -> (..., O)."""

    stored_kind = StoredLinear

    def forward(self, x: Tensor) -> Tensor:
        return self._compute(x, self.rounded_weight())


def rounded_kind(layer: nn.Module) -> type[RoundedLayer] | None:
    """The rounded twin of a float layer's type, or None where there is none."""
    if not is_plain(layer):
        return None
    if isinstance(layer, nn.Conv2d):
        return RoundedConv2d
    return RoundedLinear if isinstance(layer, nn.Linear) else None
