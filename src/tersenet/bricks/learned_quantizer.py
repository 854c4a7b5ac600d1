"""The place in a model where activations are rounded to a grid that is trained with the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersenet.bricks.quantizer import Quantizer
from tersenet.numerics.rounding import fake_quantize
from tersenet.numerics.straight_through import lsq, lsq_factor

METHODS = ("lsq", "pact", "dorefa")


class LearnedQuantizer(Quantizer):
    """A quantizer whose scale s is a parameter: y = (clamp(round(x / s) + z, 0, n) - z) s, n = 2^bits - 1.

    The zero point z is fixed by `fit`: 0 behind a ReLU. Gradients, with dy/dx = 1 inside of the grid and else 0:
    - lsq (arXiv:1902.08153): dy/ds = round(x / s) - x / s inside, -z below, n - z above, summed and times
      1 / sqrt(values per sample x n). At 8 bits too.
    - pact (arXiv:1805.06085): the ceiling c = n s is what is trained, dy/dc = 1 where x >= c, else 0, so dy/ds = n
      there. Departures: the ceiling begins where calibration puts it, and its size is not penalised unless the training
      decays it; values below zero, where there are any, have the same rule at the other end.
    - dorefa (arXiv:1606.06160): the ceiling stands still. Departure: calibration puts it, where the paper has 1.

    Parameters: scale (); its size counts, not its sign. Buffers: zero_point () uint8.
    """

    def __init__(self, bits: int = 8, method: str = "lsq") -> None:
        super().__init__(bits)
        self.method = method
        self._buffers.pop("scale")
        self.scale: Any = nn.Parameter(torch.tensor(1.0), requires_grad=method != "dorefa")
        self._seen: tuple[Tensor, int, int] | None = None

    def config(self) -> dict[str, Any]:
        return {"bits": self.bits, "method": self.method}

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer(x)
            return x
        if not torch.is_grad_enabled():
            return fake_quantize(x, self.scale.abs(), self.zero_point.to(x.dtype), self.low, self.high)
        zero = self._zero()
        low, high = self.low - zero, self.high - zero
        if self.method == "dorefa":
            return fake_quantize(x, self.scale, 0, low, high)
        if self.method == "pact":
            return _Ceiling.apply(x, self.scale.abs(), low, high)
        count = x[0].numel() if x.dim() > 1 else x.numel()
        return lsq(x, self.scale.abs(), 0, low, high, lsq_factor(count, self.high))

    def plain(self) -> Quantizer:
        """The quantizer with the scale as it is now."""
        found = Quantizer(self.bits)
        found.scale = self.scale.detach().abs().clone()
        found.zero_point = self.zero_point.clone()
        return found.train(self.training)

    def _zero(self) -> int:
        """The zero point as a number, fetched only when it has changed, so that a GPU is not waited for."""
        held = self.zero_point
        if self._seen is None or self._seen[0] is not held or self._seen[1] != held._version:
            self._seen = (held, held._version, int(held))
        return self._seen[2]


class _Ceiling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.ends = (low, high)
        return fake_quantize(x, scale, 0, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, scale = ctx.saved_tensors
        low, high = ctx.ends
        gradient = grads[0]
        above, below = x >= high * scale, x <= low * scale
        pull = high * (gradient * above).sum(dtype=torch.float64)
        if low < 0:
            pull = pull + low * (gradient * below).sum(dtype=torch.float64)
        return gradient * ~(above | below), pull.to(scale.dtype), None, None
