"""The layers that a .terse file may hold, and each as JSON: its type's name and its constructor's arguments.

A name is looked up in two tables and nowhere else: torch.nn layers, whose arguments they keep as attributes, and
bricks, which say their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from tersenet.bricks.binary import ShiftedPReLU, Sign
from tersenet.bricks.brick import Brick
from tersenet.bricks.coded import StoredConv2d, StoredLinear
from tersenet.bricks.quantized import Int8Conv2d, Int8Linear
from tersenet.bricks.quantizer import Quantizer
from tersenet.bricks.shortcut import PadShortcut
from tersenet.bricks.threshold import Threshold
from tersenet.errors import ExportError

# Bricks that a file may hold, built by their own `config`. One line adds one.
BRICKS: dict[str, type[Brick]] = {
    "Int8Conv2d": Int8Conv2d,
    "Int8Linear": Int8Linear,
    "PadShortcut": PadShortcut,
    "Quantizer": Quantizer,
    "StoredConv2d": StoredConv2d,
    "StoredLinear": StoredLinear,
    "ShiftedPReLU": ShiftedPReLU,
    "Sign": Sign,
    "Threshold": Threshold,
}

_CONV = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias", "padding_mode",
)  # fmt: skip
_TRANSPOSED = (*_CONV[:5], "output_padding", "groups", "bias", "dilation", "padding_mode")
_BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")
_AVG_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
_LP_POOL = ("norm_type", "kernel_size", "stride", "ceil_mode")
_EMBEDDING = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")

_ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {
    # weights
    nn.Linear: ("in_features", "out_features", "bias"),
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.ConvTranspose1d: _TRANSPOSED,
    nn.ConvTranspose2d: _TRANSPOSED,
    nn.ConvTranspose3d: _TRANSPOSED,
    nn.Embedding: _EMBEDDING,
    # norms
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
    nn.SyncBatchNorm: _BATCH_NORM,
    nn.InstanceNorm1d: _BATCH_NORM,
    nn.InstanceNorm2d: _BATCH_NORM,
    nn.InstanceNorm3d: _BATCH_NORM,
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", "bias"),
    nn.RMSNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.LocalResponseNorm: ("size", "alpha", "beta", "k"),
    # activations
    nn.CELU: ("alpha", "inplace"),
    nn.ELU: ("alpha", "inplace"),
    nn.GELU: ("approximate",),
    nn.GLU: ("dim",),
    nn.Hardshrink: ("lambd",),
    nn.Hardsigmoid: ("inplace",),
    nn.Hardswish: ("inplace",),
    nn.Hardtanh: ("min_val", "max_val", "inplace"),
    nn.LeakyReLU: ("negative_slope", "inplace"),
    nn.LogSigmoid: (),
    nn.LogSoftmax: ("dim",),
    nn.Mish: ("inplace",),
    nn.PReLU: ("num_parameters",),
    nn.ReLU: ("inplace",),
    nn.ReLU6: ("inplace",),
    nn.RReLU: ("lower", "upper", "inplace"),
    nn.SELU: ("inplace",),
    nn.SiLU: ("inplace",),
    nn.Sigmoid: (),
    nn.Softmax: ("dim",),
    nn.Softmin: ("dim",),
    nn.Softplus: ("beta", "threshold"),
    nn.Softshrink: ("lambd",),
    nn.Softsign: (),
    nn.Tanh: (),
    nn.Tanhshrink: (),
    nn.Threshold: ("threshold", "value", "inplace"),
    # pooling and resizing
    nn.AdaptiveAvgPool1d: ("output_size",),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AdaptiveAvgPool3d: ("output_size",),
    nn.AdaptiveMaxPool1d: ("output_size", "return_indices"),
    nn.AdaptiveMaxPool2d: ("output_size", "return_indices"),
    nn.AdaptiveMaxPool3d: ("output_size", "return_indices"),
    nn.AvgPool1d: _AVG_POOL,
    nn.AvgPool2d: (*_AVG_POOL, "divisor_override"),
    nn.AvgPool3d: (*_AVG_POOL, "divisor_override"),
    nn.LPPool1d: _LP_POOL,
    nn.LPPool2d: _LP_POOL,
    nn.LPPool3d: _LP_POOL,
    nn.MaxPool1d: _MAX_POOL,
    nn.MaxPool2d: _MAX_POOL,
    nn.MaxPool3d: _MAX_POOL,
    nn.Upsample: ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor"),
    nn.UpsamplingBilinear2d: ("size", "scale_factor"),
    nn.UpsamplingNearest2d: ("size", "scale_factor"),
    # shape
    nn.ChannelShuffle: ("groups",),
    nn.ConstantPad1d: ("padding", "value"),
    nn.ConstantPad2d: ("padding", "value"),
    nn.ConstantPad3d: ("padding", "value"),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Identity: (),
    nn.PixelShuffle: ("upscale_factor",),
    nn.PixelUnshuffle: ("downscale_factor",),
    nn.ReflectionPad1d: ("padding",),
    nn.ReflectionPad2d: ("padding",),
    nn.ReflectionPad3d: ("padding",),
    nn.ReplicationPad1d: ("padding",),
    nn.ReplicationPad2d: ("padding",),
    nn.ReplicationPad3d: ("padding",),
    nn.Unflatten: ("dim", "unflattened_size"),
    nn.ZeroPad1d: ("padding",),
    nn.ZeroPad2d: ("padding",),
    nn.ZeroPad3d: ("padding",),
    # regularisation
    nn.AlphaDropout: ("p", "inplace"),
    nn.Dropout: ("p", "inplace"),
    nn.Dropout1d: ("p", "inplace"),
    nn.Dropout2d: ("p", "inplace"),
    nn.Dropout3d: ("p", "inplace"),
    nn.FeatureAlphaDropout: ("p", "inplace"),
}

# By name; torch's Threshold is not the brick of that name.
LAYERS = {
    f"nn.{kind.__name__}" if kind.__name__ in BRICKS else kind.__name__: (kind, arguments)
    for kind, arguments in _ARGUMENTS.items()
}
_NAMES = {kind: name for name, (kind, _) in LAYERS.items()}


def layer_to_json(path: str, layer: nn.Module) -> list[Any]:
    """[type, settings]. Raises ExportError for a layer that is on neither table; `path` is for its message."""
    name = type(layer).__name__
    if parametrize.is_parametrized(layer):
        raise ExportError(
            f"layer {path} ({type(layer).__mro__[1].__name__}) still has a parametrization, and a .terse file holds "
            "plain layers; settle the model first"
        )
    if BRICKS.get(name) is type(layer):
        return [name, layer.config()]
    kind: type[nn.Module] = type(layer)
    if kind is nn.modules.linear.NonDynamicallyQuantizableLinear:  # the last layer of an attention, as linear as any
        kind = nn.Linear
    if kind in _NAMES:
        name = _NAMES[kind]
        values = {argument: getattr(layer, argument) for argument in LAYERS[name][1]}
        if "bias" in values:
            values["bias"] = values["bias"] is not None
        return [name, {argument: list(v) if isinstance(v, tuple) else v for argument, v in values.items()}]
    raise ExportError(
        f"layer {path} is a {type(layer).__module__}.{name}, which a .terse file does not know; write it with tensor "
        "operations in a module of your own (not from torch.nn), or export to .onnx or .pt2"
    )


def layer_from_json(kind: Any, config: Any, root: dict[str, Any]) -> nn.Module:
    """The inverse, on the meta device, which has no memory, so a hostile size costs nothing.

    Args:
        root: the layers so far, for `same`.
    Raises:
        ValueError: when there is no such layer, or not with these settings.
    """
    want(isinstance(kind, str) and isinstance(config, dict), "a layer is malformed")
    if kind == "same":
        same = root.get(config["as"]) if isinstance(config.get("as"), str) else None
        want(isinstance(same, nn.Module), "a layer is the same as one that is not there")
        return same  # type: ignore[return-value]
    for value in config.values():
        want(
            all(map(_plain, value)) if isinstance(value, list) else _plain(value),
            f"the settings of a {kind} are malformed",
        )
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    if kind in BRICKS:
        make: Callable[..., nn.Module] = BRICKS[kind]
        want(not {"device", "dtype"} & set(arguments), f"a {kind} cannot choose its device")
    else:
        want(kind in LAYERS, f"there is no layer of type {kind!r}")
        make, known = LAYERS[kind]
        want(set(arguments) <= set(known), f"a {kind} has settings that it does not know")
    try:
        with torch.device("meta"):
            return make(**arguments)
    except Exception as error:  # the constructors raise many kinds on wrong settings
        raise ValueError(f"a {kind} cannot be built: {str(error)[:200]}") from error


def _plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= 64
    return value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**31)


def want(true: bool, otherwise: str) -> None:
    """Raises ValueError(otherwise) unless true."""
    if not true:
        raise ValueError(otherwise)
