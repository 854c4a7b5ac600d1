"""The place in a model where activations are rounded to a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tersenet.bricks.brick import Brick
from tersenet.numerics.rounding import fake_quantize, grid


class Quantizer(Brick):
    """Rounds activations to unsigned integers and back, with one scale and zero point for the whole tensor.

    y = (clamp(round(x / scale) + zero_point, 0, 2^bits - 1) - zero_point) * scale; any shape, gradient as in
    `numerics.rounding.fake_quantize`. One quantizer may be called at several places, which then share their grid.

    Buffers: scale () float, zero_point () uint8. They are numbers, set by calibration; training keeps them.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        self.bits = bits
        self.low, self.high = grid(bits, signed=False)
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.uint8))
        # During calibration only: sees the float values, which then pass unrounded.
        self.observer: Callable[[Tensor], None] | None = None

    def config(self) -> dict[str, Any]:
        return {"bits": self.bits}

    @property
    def reach(self) -> tuple[float, float]:
        """The lowest and the highest value of the grid."""
        scale, zero_point = float(self.scale), int(self.zero_point)
        return (self.low - zero_point) * scale, (self.high - zero_point) * scale

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer(x)
            return x
        return fake_quantize(x, self.scale, self.zero_point.to(x.dtype), self.low, self.high)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
