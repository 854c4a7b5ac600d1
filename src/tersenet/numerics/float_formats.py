"""Rounding to short floats: fp16, bf16, and the two of 8 bits, e4m3 and e5m2.

The formats of 8 bits are those of Micikevicius et al., "FP8 formats for deep learning", arXiv:2209.05433; e4m3 is the
one without infinities ("e4m3fn"). Round to nearest, ties to even, by torch's own types. Values beyond the largest
finite one become it, as in ONNX's Cast with `saturate`: a weight that became infinite would ruin the network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATS = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def highest(kind: str) -> float:
    """The largest finite value of a format.

    >>> [highest(kind) for kind in ("fp16", "fp8_e4m3", "fp8_e5m2")]
    [65504.0, 448.0, 57344.0]
    """
    return torch.finfo(FLOATS[kind]).max


def encode(x: Tensor, kind: str) -> Tensor:
    """x in the format, as a tensor of torch's type for it. NaN stays NaN.

    Args:
        x: any shape; float32, or a type of which each value is one of float32.
        kind: one of FLOATS.
    """
    top = highest(kind)
    return x.clamp(-top, top).to(FLOATS[kind])


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(x.abs() <= highest(kind))
        return encode(x, kind).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None


def round_float(x: Tensor, kind: str) -> Tensor:
    """x rounded to the format and back, in its own type.

    dy/dx = 1 where |x| <= the largest finite value, else 0 (straight-through, as in rounding.fake_quantize).

    >>> round_float(torch.tensor([0.3, 1000.0]), "fp8_e4m3").tolist()
    [0.3125, 448.0]
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _StraightThrough.apply(x, kind)
    return encode(x, kind).to(x.dtype)


def float_scale(x: Tensor, kind: str) -> Tensor:
    """(O,): powers of two that bring the largest value of each channel into the upper half of the format's range.

    Powers of two, so that scaling rounds nothing by itself. Divide by it before rounding, multiply after. Channels of
    zeros get 1.

    Args:
        x: (O, ...).
    """
    largest = x.detach().reshape(len(x), -1).abs().amax(dim=1).double()
    power = torch.ceil(torch.log2(largest.clamp(min=1e-300) / highest(kind)))
    return torch.where(largest > 0, torch.exp2(power), 1.0).to(x.dtype)
