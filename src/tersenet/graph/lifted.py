"""The torch.nn layer that an aten operator on plain parameters is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

aten = torch.ops.aten
_CONVOLUTIONS = {
    aten.conv1d.default: nn.Conv1d, aten.conv2d.default: nn.Conv2d, aten.conv3d.default: nn.Conv3d,
    aten.conv1d.padding: nn.Conv1d, aten.conv2d.padding: nn.Conv2d, aten.conv3d.padding: nn.Conv3d,
}  # fmt: skip
_TRANSPOSED = {
    aten.conv_transpose1d.default: nn.ConvTranspose1d, aten.conv_transpose2d.input: nn.ConvTranspose2d,
    aten.conv_transpose3d.input: nn.ConvTranspose3d,
}  # fmt: skip
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_SECOND = (aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default)


def is_product(node: fx.Node) -> bool:
    """Whether an operator is a convolution or a linear map."""
    return node.target in _CONVOLUTIONS or node.target in _TRANSPOSED or node.target is aten.linear.default


def weight_of(node: fx.Node) -> Any:
    """What an operator has where a layer has its weight."""
    place = 2 if node.target in _SECOND else 1
    return node.args[place] if len(node.args) > place else None


def layer_of(node: fx.Node, value: Callable[[Any], Any]) -> nn.Module | None:
    """The torch.nn layer with the same parameters as an aten operator; None where there is none.

    Args:
        value: gives the tensor of a node; anything else as it is.
    """
    if node.kwargs:
        return None
    args: list[Any] = [value(arg) if i else None for i, arg in enumerate(node.args)]
    if any(isinstance(leaf, fx.Node) for leaf in torch.utils._pytree.tree_leaves(args)):
        return None  # a setting is computed
    if node.target in _CONVOLUTIONS:
        layer = _convolution(_CONVOLUTIONS[node.target], args)
    elif node.target in _TRANSPOSED:
        layer = _transposed(_TRANSPOSED[node.target], args)
    elif node.target is aten.linear.default:
        weight, bias = (args + [None] * 3)[1:3]
        layer = None
        if weight.dim() == 2:
            with torch.device("meta"):
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    elif node.target is aten.batch_norm.default:
        layer = _batch_norm(node, args)
    else:
        layer = _other_norm(node, args)
    if layer is None:
        return None
    for name, tensor in (("weight", weight_of(node)), ("bias", bias_of(node))):
        if name in layer._parameters:
            setattr(layer, name, value(tensor))
    return layer.eval()  # the program was captured in evaluation mode


def bias_of(node: fx.Node) -> Any:
    """What an operator has where a layer has its bias."""
    place = 3 if node.target in (aten.layer_norm.default, aten.group_norm.default) else 2
    return node.args[place] if len(node.args) > place else None


def _sides(value: Any, default: int, rank: int) -> Any:
    if isinstance(value, str):
        return value
    sides = tuple(value) if value else (default,) * rank
    return sides * rank if len(sides) == 1 else sides


def _convolution(kind: Any, args: list[Any]) -> nn.Module | None:
    weight, bias, stride, padding, dilation, groups = (args + [None] * 7)[1:7]
    rank = weight.dim() - 2
    groups = 1 if groups is None else groups
    with torch.device("meta"):
        return kind(
            weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), _sides(stride, 1, rank),
            _sides(padding, 0, rank), _sides(dilation, 1, rank), groups, bias=bias is not None,
        )  # fmt: skip


def _transposed(kind: Any, args: list[Any]) -> nn.Module | None:
    weight, bias, stride, padding, more, groups, dilation = (args + [None] * 8)[1:8]
    rank = weight.dim() - 2
    groups = 1 if groups is None else groups
    with torch.device("meta"):
        return kind(
            weight.shape[0], weight.shape[1] * groups, tuple(weight.shape[2:]), _sides(stride, 1, rank),
            _sides(padding, 0, rank), _sides(more, 0, rank), groups, bias is not None, _sides(dilation, 1, rank),
        )  # fmt: skip


def _batch_norm(node: fx.Node, args: list[Any]) -> nn.Module | None:
    weight, bias, mean, variance, training, momentum, eps = args[1:8]
    kind = _BATCH_NORMS.get(len(node.meta["val"].shape))
    if training or weight is None or bias is None or mean is None or kind is None:
        return None
    layer = kind(len(weight), eps=eps, momentum=momentum)
    layer.running_mean, layer.running_var = mean, variance
    return layer


def _other_norm(node: fx.Node, args: list[Any]) -> nn.Module | None:
    if node.target in (aten.layer_norm.default, aten.rms_norm.default) and len(args[1]) > 1:
        return None  # followed as an operator, each of its dimensions by itself
    if node.target is aten.layer_norm.default:
        shape, _, bias, eps = (args + [None] * 5)[1:5]
        return nn.LayerNorm(shape, eps=1e-5 if eps is None else eps, bias=bias is not None)
    if node.target is aten.group_norm.default:
        groups, weight, bias, eps = (args + [None] * 5)[1:5]
        return None if bias is None else nn.GroupNorm(groups, len(weight), eps=1e-5 if eps is None else eps)
    if node.target is aten.rms_norm.default:
        shape, _, eps = (args + [None] * 4)[1:4]
        return nn.RMSNorm(shape, eps=eps)
    return None
