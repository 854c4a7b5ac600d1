"""Forced activation threshold: small activations become zero.

FATReLU of Kurtz et al., "Inducing and exploiting activation sparsity for fast inference on deep neural networks",
ICML 2020: y = x where x > t, else 0, with t >= 0. Departures: it stands behind the activation and does not replace it,
so that whatever follows a convolution directly stays what runtimes fuse; values of either sign are cut by their size;
a threshold may be one for the layer or one per channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersenet.bricks.brick import Brick


class Threshold(Brick):
    """y = 0 where x <= t (or |x| <= t where values have both signs), else x; any shape, or (N, C, ...) per channel.

    The gradient is the plain one: 1 where the value is kept and 0 where it is cut, and t is not learned. That is the
    gradient of ReLU with a later start, so a network can be trained behind its thresholds: Kurtz et al. do so. A
    value that is not a number stays what it is, so that it is not hidden.

    A threshold of 0 changes nothing: behind a ReLU x <= 0 says x = 0, and |x| <= 0 always does.

    Buffers: threshold () or (C,) float. It is a number, set on calibration data; training keeps it.

    Args:
        num_features: C for one threshold per channel, None for one in all. The name is that of norms, so that channel
            surgery cuts the thresholds with the channels.
        signed: whether values below zero are to be kept when they are large.
    """

    threshold: Tensor

    def __init__(self, num_features: int | None = None, signed: bool = False) -> None:
        super().__init__()
        if num_features is not None:
            self.num_features = num_features
        self.signed = signed
        self.register_buffer("threshold", torch.zeros(() if num_features is None else (num_features,)))

    def config(self) -> dict[str, Any]:
        return {"num_features": getattr(self, "num_features", None), "signed": self.signed}

    def forward(self, x: Tensor) -> Tensor:
        limit = self.threshold
        if limit.dim():
            limit = limit.reshape(-1, *(1,) * (x.dim() - 2))
        return x.masked_fill((x.abs() if self.signed else x) <= limit, 0.0)

    def extra_repr(self) -> str:
        return f"num_features={getattr(self, 'num_features', None)}, signed={self.signed}"
