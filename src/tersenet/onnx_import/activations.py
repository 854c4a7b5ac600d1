"""Activations and softmax."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.onnx_import.call import Call, parameter
from tersenet.onnx_import.registry import operator


@operator("Relu")
def relu(call: Call) -> Tensor:
    return F.relu(call.tensor(0))


@operator("LeakyRelu")
def leaky_relu(call: Call) -> Tensor:
    return F.leaky_relu(call.tensor(0), call.attribute("alpha", 0.01))


@operator("PRelu")
def prelu(call: Call) -> Tensor:
    x, slope = call.tensor(0), call.constant(1)
    one = slope is not None and slope.array.size == 1
    channels = slope is not None and x.dim() > 1 and slope.array.shape in _per_channel(x)
    if slope is None or not (one or channels):
        slopes = call.tensor(1)
        return torch.where(x >= 0, x, x * slopes)

    def make() -> nn.Module:
        layer = nn.PReLU(slope.array.size)
        layer.weight = parameter(slope.array.reshape(-1))
        return layer

    return call.layer(make, slope)(x)


def _per_channel(x: Tensor) -> tuple[tuple[int, ...], ...]:
    """Shapes that numbers of each channel of (N, C, ...) have."""
    ones = (1,) * (x.dim() - 2)
    return ((x.shape[1], *ones), (1, x.shape[1], *ones))


@operator("Elu")
def elu(call: Call) -> Tensor:
    return F.elu(call.tensor(0), call.attribute("alpha", 1.0))


@operator("Selu")
def selu(call: Call) -> Tensor:
    x, alpha, gamma = call.tensor(0), call.attribute("alpha", 1.67326319), call.attribute("gamma", 1.05070102)
    if math.isclose(alpha, 1.67326319, rel_tol=1e-5) and math.isclose(gamma, 1.05070102, rel_tol=1e-5):
        return F.selu(x)
    return gamma * F.elu(x, alpha)


@operator("Celu")
def celu(call: Call) -> Tensor:
    return F.celu(call.tensor(0), call.attribute("alpha", 1.0))


@operator("Sigmoid")
def sigmoid(call: Call) -> Tensor:
    return torch.sigmoid(call.tensor(0))


@operator("HardSigmoid")
def hard_sigmoid(call: Call) -> Tensor:
    x, alpha, beta = call.tensor(0), call.attribute("alpha", 0.2), call.attribute("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-4) and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0, 1)


@operator("HardSwish")
def hard_swish(call: Call) -> Tensor:
    return F.hardswish(call.tensor(0))


@operator("Swish")
def swish(call: Call) -> Tensor:
    x, alpha = call.tensor(0), call.attribute("alpha", 1.0)
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@operator("Gelu")
def gelu(call: Call) -> Tensor:
    return F.gelu(call.tensor(0), approximate=call.one_of("approximate", ("none", "tanh"), "none"))


@operator("Mish")
def mish(call: Call) -> Tensor:
    return F.mish(call.tensor(0))


@operator("Softplus")
def softplus(call: Call) -> Tensor:
    return F.softplus(call.tensor(0))


@operator("Softsign")
def softsign(call: Call) -> Tensor:
    return F.softsign(call.tensor(0))


@operator("Tanh")
def tanh(call: Call) -> Tensor:
    return torch.tanh(call.tensor(0))


@operator("ThresholdedRelu")
def thresholded_relu(call: Call) -> Tensor:
    return F.threshold(call.tensor(0), call.attribute("alpha", 1.0), 0.0)


@operator("Shrink")
def shrink(call: Call) -> Tensor:
    x, bias, limit = call.tensor(0), call.attribute("bias", 0.0), call.attribute("lambd", 0.5)
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, torch.zeros_like(x)))


@operator("Clip")
def clip(call: Call) -> Tensor:
    x = call.tensor(0)
    low = call.operand(1, 0) if call.has(1) else call.attribute("min")
    high = call.operand(2, 0) if call.has(2) else call.attribute("max")
    if isinstance(low, float) and low <= np.finfo(np.float32).min:
        low = None
    if isinstance(high, float) and high >= np.finfo(np.float32).max:
        high = None
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        x = x if low is None else torch.maximum(x, torch.as_tensor(low, dtype=x.dtype))
        return x if high is None else torch.minimum(x, torch.as_tensor(high, dtype=x.dtype))
    return x if low is None and high is None else torch.clamp(x, low, high)


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


_SOFT: dict[str, Callable[[Tensor, int], Tensor]] = {
    "Softmax": torch.softmax,
    "LogSoftmax": torch.log_softmax,
    "Hardmax": _hardmax,
}


@operator("Softmax", "LogSoftmax", "Hardmax")
def softmax(call: Call) -> Tensor:
    """Before operator set 13 all dimensions from `axis` on are one."""
    x = call.tensor(0)
    old = call.version < 13
    axis = call.attribute("axis", 1 if old else -1) % max(x.dim(), 1)
    function = _SOFT[call.step.op]
    behind = x.shape[axis + 1 :]
    if not old or all(isinstance(size, int) and size == 1 for size in behind):
        return function(x, axis)
    return function(x.flatten(axis), -1).reshape(x.shape)
