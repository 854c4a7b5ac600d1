"""Normalizations: torch's layers where their numbers are constants."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.onnx_import.call import Call, parameter
from tersenet.onnx_import.registry import operator
from tersenet.onnx_import.values import Host, as_tensor

_BATCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


@operator("BatchNormalization")
def batch_norm(call: Call) -> Tensor:
    x, eps = call.tensor(0), call.attribute("epsilon", 1e-5)
    call.ignore("momentum", "spatial")
    if call.attribute("training_mode", 0):
        call.refuse("is in training mode; export the model in evaluation mode")
    numbers = [call.constant(i) for i in range(1, 5)]
    if None in numbers or x.dim() not in _BATCH:
        weight, bias, mean, variance = (call.tensor(i) for i in range(1, 5))
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    def make() -> nn.Module:
        weight, bias, mean, variance = (each.array for each in numbers if each is not None)
        layer: Any = _BATCH[x.dim()](len(weight), eps)
        layer.weight, layer.bias = parameter(weight), parameter(bias)
        layer.running_mean, layer.running_var = as_tensor(mean), as_tensor(variance)
        return layer

    return call.layer(make, *numbers)(x)


@operator("InstanceNormalization")
def instance_norm(call: Call) -> Tensor:
    x, eps = call.tensor(0), call.attribute("epsilon", 1e-5)
    weight, bias = call.constant(1), call.constant(2)
    if weight is None or bias is None or x.dim() not in _INSTANCE:
        return F.instance_norm(x, weight=call.tensor(1), bias=call.tensor(2), eps=eps)

    def make() -> nn.Module:
        layer = _INSTANCE[x.dim()](weight.array.size, eps, affine=True)
        return _affine(layer, weight, bias)

    return call.layer(make, weight, bias)(x)


def _affine(layer: Any, weight: Host, bias: Host | None) -> nn.Module:
    layer.weight = parameter(weight.array)
    if bias is not None:
        layer.bias = parameter(bias.array)
    return layer


@operator("LayerNormalization")
def layer_norm(call: Call) -> Any:
    x, eps = call.tensor(0), call.attribute("epsilon", 1e-5)
    call.ignore("stash_type")
    axis = call.attribute("axis", -1) % x.dim()
    shape, weight, bias = tuple(x.shape[axis:]), call.constant(1), call.constant(2)
    fits = weight is not None and weight.array.shape == shape
    if call.uses(1) or call.uses(2) or not fits or (call.has(2) and (bias is None or bias.array.shape != shape)):
        axes = list(range(axis, x.dim()))
        mean = x.mean(axes, keepdim=True)
        inverse = torch.rsqrt((x - mean).square().mean(axes, keepdim=True) + eps)
        y = (x - mean) * inverse * call.tensor(1)
        return (y + call.tensor(2) if call.has(2) else y), mean, inverse

    def make() -> nn.Module:
        assert weight is not None
        return _affine(nn.LayerNorm(shape, eps, bias=bias is not None), weight, bias)

    return call.layer(make, weight, bias)(x)


@operator("RMSNormalization")
def rms_norm(call: Call) -> Tensor:
    x, eps = call.tensor(0), call.attribute("epsilon", 1e-5)
    call.ignore("stash_type")
    axis = call.attribute("axis", -1) % x.dim()
    shape, weight = tuple(x.shape[axis:]), call.constant(1)
    if weight is None or weight.array.shape != shape:
        axes = list(range(axis, x.dim()))
        return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + eps) * call.tensor(1)
    return call.layer(lambda: _affine(nn.RMSNorm(shape, eps), weight, None), weight)(x)


@operator("GroupNormalization")
def group_norm(call: Call) -> Tensor:
    """Before operator set 21 there is a scale per group."""
    x, eps, groups = call.tensor(0), call.attribute("epsilon", 1e-5), call.attribute("num_groups")
    call.ignore("stash_type")
    weight, bias, channels = call.constant(1), call.constant(2), int(x.shape[1])
    if weight is None or bias is None:
        each = [call.tensor(i).repeat_interleave(channels // call.tensor(i).numel()) for i in (1, 2)]
        return F.group_norm(x, groups, each[0], each[1], eps)

    def make() -> nn.Module:
        layer = nn.GroupNorm(groups, channels, eps)
        spread = [Host(np.repeat(each.array, channels // each.array.size), each.name) for each in (weight, bias)]
        return _affine(layer, *spread)

    return call.layer(make, weight, bias)(x)


@operator("LRN")
def local_response_norm(call: Call) -> Tensor:
    size = call.attribute("size")
    if size % 2 == 0:
        call.refuse(f"has size={size}; odd sizes are supported")
    alpha, beta, bias = call.attribute("alpha", 1e-4), call.attribute("beta", 0.75), call.attribute("bias", 1.0)
    return F.local_response_norm(call.tensor(0), size, alpha, beta, bias)


@operator("LpNormalization")
def lp_norm(call: Call) -> Tensor:
    x, axis, p = call.tensor(0), call.attribute("axis", -1), call.one_of("p", (1, 2), 2)
    length = x.abs().sum(axis, keepdim=True) if p == 1 else x.square().sum(axis, keepdim=True).sqrt()
    return torch.where(length == 0, 0.0, x / torch.where(length == 0, 1.0, length)).to(x.dtype)


@operator("MeanVarianceNormalization")
def mean_variance_norm(call: Call) -> Tensor:
    x, axes = call.tensor(0), call.attribute("axes", [0, 2, 3])
    centered = x - x.mean(axes, keepdim=True)
    return centered / (centered.square().mean(axes, keepdim=True).sqrt() + math.ldexp(1, -30))
