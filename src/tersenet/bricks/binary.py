"""Binary activations, the convolution that reads them, and ReActNet's activation function.

Courbariaux et al., "Binarized neural networks", arXiv:1602.02830 (BNN); Rastegari et al., "XNOR-Net", arXiv:1603.05279;
Liu et al., "Bi-Real Net", arXiv:1808.00278; Liu et al., "ReActNet", arXiv:2003.03488. Weights are those of
bricks/few_bits.py under the rules bnn, bwn and magnitude_aware.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tersenet.bricks.brick import Brick
from tersenet.bricks.few_bits import FewBitConv2d, FewBitLayer, FewBitLinear
from tersenet.numerics.binary import input_scales, signs
from tersenet.numerics.sign_gradients import clipped_sign, polynomial_sign, shifted_prelu


class Sign(Brick):
    """y = +1 where x >= shift, else -1: (N, C, ...) -> the same.

    Gradients: "clipped" (BNN, XNOR), dy/dx = 1 where |x - shift| <= 1, else 0; "polynomial" (Bi-Real, ReActNet),
    dy/dx = max(0, 2 - 2 |x - shift|). A learned shift (ReActNet's RSign) has dy/dshift = -dy/dx, summed over the
    channel.

    Args:
        num_features: C, one shift per channel. The name is that of norms, so that channel surgery cuts the shifts with
            the channels.
        gradient: clipped or polynomial.
        learned: whether the shift is trained, or stands where it was put.
    """

    def __init__(self, num_features: int, gradient: str = "polynomial", learned: bool = True) -> None:
        super().__init__()
        self.num_features, self.gradient, self.learned = num_features, gradient, learned
        self.shift = nn.Parameter(torch.zeros(num_features), requires_grad=learned)

    def config(self) -> dict[str, Any]:
        return {"num_features": self.num_features, "gradient": self.gradient, "learned": self.learned}

    def forward(self, x: Tensor) -> Tensor:
        # In the type of the values: under mixed precision a float32 shift would widen them.
        x = x - self.shift.to(x.dtype).view(1, -1, *(1,) * (x.dim() - 2))
        if not torch.is_grad_enabled():
            return signs(x)
        return clipped_sign(x) if self.gradient == "clipped" else polynomial_sign(x)


class ShiftedPReLU(Brick):
    """ReActNet's RPReLU: y = prelu(x - before) + after, (N, C, ...) -> the same; everything learned per channel.

    With u = x - before: y = u + after where u > 0, else slope u + after. dy/dx = 1 or slope; dy/dslope = min(u, 0);
    dy/dafter = 1; dy/dbefore = -dy/dx. Slopes begin at 0.25, shifts at 0.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.before = nn.Parameter(torch.zeros(num_features))
        self.after = nn.Parameter(torch.zeros(num_features))
        self.slope = nn.Parameter(torch.full((num_features,), 0.25))

    def config(self) -> dict[str, Any]:
        return {"num_features": self.num_features}

    def forward(self, x: Tensor) -> Tensor:
        return shifted_prelu(x, self.before.to(x.dtype), self.after.to(x.dtype), self.slope.to(x.dtype))


class BinaryConv2d(nn.Module):
    """Signs of the input, then a convolution with few-valued weights: (N, I, H, W) -> (N, O, H', W').

    No brick, but two: `sign` and `conv`. Borders are zeros. With `scaled_input` the result is multiplied with
    XNOR-Net's K, the mean magnitude of the input under each place of the kernel (arXiv:1603.05279, section 3.2),
    through which the gradient is the true one.
    """

    def __init__(self, sign: Sign, conv: FewBitConv2d, scaled_input: bool = False) -> None:
        super().__init__()
        self.sign, self.conv, self.scaled_input = sign, conv, scaled_input

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.sign(x))
        if not self.scaled_input:
            return y
        conv = cast(Any, self.conv)
        return y * input_scales(x, conv.kernel_size, conv.stride, conv.padding)


def binary_weights(layer: FewBitLayer, rule: str) -> FewBitLayer:
    """A layer with the same float weights under another rule, such as the second stage's after the first's `real`."""
    kind = FewBitConv2d if isinstance(layer, FewBitConv2d) else FewBitLinear  # a masked layer's type is one of its own
    return kind.of(layer, rule, layer.bits, layer.granularity)
