"""Convolutions and transposed convolutions as torch's layers, with ONNX's ways to say a padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.onnx_import.call import Call, parameter, spatial
from tersenet.onnx_import.registry import operator
from tersenet.onnx_import.values import Host

_CONV: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def window(call: Call, kernel: Sequence[int], x: Tensor) -> tuple[list[int], list[int], list[int], list[int]]:
    """(strides, dilations, padding before, padding behind) of a window that moves over (N, C, H, W, ...)."""
    k = len(kernel)
    strides = call.attribute("strides") or [1] * k
    dilations = call.attribute("dilations") or [1] * k
    pads = call.attribute("pads") or [0] * 2 * k
    auto = call.one_of("auto_pad", ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"), "NOTSET")
    if auto == "VALID":
        pads = [0] * 2 * k
    elif auto != "NOTSET":
        total = []
        for size, each, stride, dilation in zip(spatial(x), kernel, strides, dilations, strict=True):
            reach = dilation * (each - 1) + 1
            total.append(max(0, (-(-size // stride) - 1) * stride + reach - size))
        less, more = [each // 2 for each in total], [each - each // 2 for each in total]
        pads = [*less, *more] if auto == "SAME_UPPER" else [*more, *less]
    return list(strides), list(dilations), list(pads[:k]), list(pads[k:])


def padded(x: Tensor, before: Sequence[int], behind: Sequence[int], value: float = 0.0) -> Tensor:
    """(N, C, H, W, ...) with so much at the ends of H, W, ...; negative amounts cut off."""
    amounts = [amount for pair in zip(before[::-1], behind[::-1], strict=True) for amount in pair]
    return F.pad(x, amounts, value=value) if any(amounts) else x


@operator("Conv")
def conv(call: Call) -> Tensor:
    x, weight = call.tensor(0), call.constant(1)
    kernel = list(call.tensor(1).shape[2:] if weight is None else weight.array.shape[2:])
    call.ignore("kernel_shape")
    strides, dilations, before, behind = window(call, kernel, x)
    groups = call.attribute("group", 1)
    if before != behind or min(before) < 0:
        x, before = padded(x, before, behind), [0] * len(kernel)
    bias = call.constant(2)
    k = len(kernel)
    if k > 3:
        call.refuse(f"moves over {k} dimensions; up to 3 are supported")
    if weight is None or (call.has(2) and bias is None):
        function = (F.conv1d, F.conv2d, F.conv3d)[k - 1]
        return function(x, call.tensor(1), call.tensor(2) if call.has(2) else None, strides, before, dilations, groups)

    def make() -> nn.Module:
        out, each = weight.array.shape[:2]
        layer = _CONV[k - 1](
            each * groups, out, tuple(kernel), tuple(strides), tuple(before), tuple(dilations), groups, bias is not None
        )
        return _with_numbers(layer, weight, bias)

    return call.layer(make, weight, bias)(x)


@operator("ConvTranspose")
def conv_transpose(call: Call) -> Tensor:
    x, weight, bias = call.tensor(0), call.constant(1), call.constant(2)
    shape = call.tensor(1).shape if weight is None else weight.array.shape
    kernel, k = list(shape[2:]), len(shape) - 2
    call.ignore("kernel_shape")
    if k > 3:
        call.refuse(f"moves over {k} dimensions; up to 3 are supported")
    groups = call.attribute("group", 1)
    strides, dilations, before, behind, extra = _transposed_window(call, kernel, x)
    inside = before == behind and min(before) >= 0
    more_than = [e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)]
    if any(more_than):
        inside = False
    padding = before if inside else [0] * k
    added = extra if inside else [0] * k
    if weight is None or (call.has(2) and bias is None):
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[k - 1]
        bias_tensor = call.tensor(2) if call.has(2) else None
        y = function(x, call.tensor(1), bias_tensor, strides, padding, added, groups, dilations)
    else:

        def make() -> nn.Module:
            layer = _TRANSPOSED[k - 1](
                shape[0], shape[1] * groups, tuple(kernel), tuple(strides), tuple(padding), tuple(added), groups,
                bias is not None, tuple(dilations),
            )  # fmt: skip
            return _with_numbers(layer, weight, bias)

        y = call.layer(make, weight, bias)(x)
    if inside:
        return y
    if any(e > b for e, b in zip(extra, behind, strict=True)) and call.has(2):
        call.refuse("has an output padding beyond its padding, together with a bias, which torch does not have")
    return padded(y, [-each for each in before], [e - each for e, each in zip(extra, behind, strict=True)])


def _transposed_window(call: Call, kernel: Sequence[int], x: Tensor) -> tuple[list[int], ...]:
    """(strides, dilations, cut before, cut behind, output padding)."""
    k = len(kernel)
    strides, dilations = call.attribute("strides") or [1] * k, call.attribute("dilations") or [1] * k
    extra = call.attribute("output_padding") or [0] * k
    pads = call.attribute("pads") or [0] * 2 * k
    auto = call.one_of("auto_pad", ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"), "NOTSET")
    target = call.attribute("output_shape")
    if auto == "VALID":
        pads = [0] * 2 * k
    if target is not None or auto.startswith("SAME"):
        sizes = spatial(x)
        target = list(target)[-k:] if target is not None else [s * e for s, e in zip(strides, sizes, strict=True)]
        total = [
            stride * (size - 1) + more + dilation * (each - 1) + 1 - out
            for stride, size, more, dilation, each, out in zip(
                strides, sizes, extra, dilations, kernel, target, strict=True
            )
        ]
        extra = [more + max(0, -each) for more, each in zip(extra, total, strict=True)]
        total = [max(0, each) for each in total]
        less, more = [each // 2 for each in total], [each - each // 2 for each in total]
        pads = [*less, *more] if auto == "SAME_UPPER" else [*more, *less]
    return list(strides), list(dilations), list(pads[:k]), list(pads[k:]), list(extra)


def _with_numbers(layer: Any, weight: Host, bias: Host | None) -> nn.Module:
    layer.weight = parameter(weight.array)
    if bias is not None:
        layer.bias = parameter(bias.array)
    return layer
