"""Strided depthwise convolutions while a model trains in bf16 on a CPU: the gradient of their input, faster.

For it oneDNN has no kernel in bf16 and takes its reference loop: 149 ms for (128, 96, 32, 32) and stride 2 on one core,
against 5 ms for the gradient of the weights. The same gradient is a convolution without stride, of the outgoing
gradient with zeros put between its values: 6 ms.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@contextlib.contextmanager
def faster_depthwise(model: nn.Module) -> Iterator[None]:
    """Inside, strided depthwise layers of the model use the faster gradient wherever they run in bf16 on the CPU."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and _fits(layer)]
    for layer in layers:
        vars(layer)["_conv_forward"] = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("_conv_forward", None)


def _fits(layer: nn.Conv2d) -> bool:
    if type(layer)._conv_forward is not nn.Conv2d._conv_forward:
        return False  # a subclass convolves in its own way
    if layer.groups != layer.in_channels or layer.groups == 1 or layer.padding_mode != "zeros":
        return False
    if max(layer.stride) == 1 or isinstance(layer.padding, str):
        return False
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return all(r >= p for r, p in zip(reach, layer.padding, strict=True))


def _forward(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    mixed = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if x.device.type != "cpu" or x.dim() != 4 or not mixed:
        return nn.Conv2d._conv_forward(layer, x, weight, bias)
    half = torch.bfloat16
    y: Tensor = _Depthwise.apply(x.to(half), weight.to(half), layer.stride, layer.padding, layer.dilation)
    return y if bias is None else y + bias.to(half).view(1, -1, 1, 1)


class _Depthwise(torch.autograd.Function):
    """conv2d(x, weight), groups = channels of x: (N, C, H, W), (M C, 1, K, L) -> (N, M C, H', W')."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding, dilation
        return F.conv2d(x, weight, None, stride, padding, dilation, x.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (x, weight), (stride, padding, dilation), gradient = ctx.saved_tensors, ctx.geometry, gradients[0]
        channels = x.shape[1]
        dx = dw = None
        if ctx.needs_input_grad[0]:
            reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            sizes = [n - r + 2 * p for n, r, p in zip(x.shape[2:], reach, padding, strict=True)]
            spread = torch.zeros(
                (*gradient.shape[:2], *sizes), dtype=gradient.dtype, device=gradient.device
            ).contiguous(memory_format=torch.channels_last)
            spread[:, :, :: stride[0], :: stride[1]] = gradient
            outer = [r - p for r, p in zip(reach, padding, strict=True)]
            # Turned round, and one row of M kernels for each channel of x.
            kernels = weight.flip(2, 3).reshape(channels, -1, *weight.shape[2:])
            dx = F.conv2d(spread, kernels, None, 1, outer, dilation, channels)
        if ctx.needs_input_grad[1]:
            _, dw, _ = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, stride, padding, dilation, False, [0, 0], channels, [False, True, False]
            )
        return dx, dw, None, None, None
