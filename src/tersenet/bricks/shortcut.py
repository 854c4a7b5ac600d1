"""The parameter-free shortcut of the CIFAR ResNets: subsample, pad with zeros.

"Option A" of He et al., arXiv:1512.03385.

A module of its own, so that channel surgery can change how much is padded.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from tersenet.bricks.brick import Brick


class PadShortcut(Brick):
    """Every `stride`-th pixel of each channel, between `before` and `after` channels of zeros.

    (N, C, H, W) -> (N, before + C + after, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, stride: int, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.before, self.after = stride, before, after

    def config(self) -> dict[str, Any]:
        return {"stride": self.stride, "before": self.before, "after": self.after}

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, before={self.before}, after={self.after}"
