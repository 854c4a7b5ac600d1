"""Small forms of what stands in networks, each between quantized layers, bundled so that an export serves several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, SIDE = 8, 16
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
X = torch.randn(32, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Bundle(nn.Module):
    """Each form behind a convolution of its own; their outputs side by side."""

    def __init__(self, forms: dict[str, nn.Module]) -> None:
        super().__init__()
        self.stems = nn.ModuleDict({name: nn.Conv2d(1, WIDTH, 3, padding=1) for name in forms})
        self.forms = nn.ModuleDict(forms)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([form(self.stems[name](x)) for name, form in self.forms.items()], 1)

    def columns(self) -> dict[str, slice]:
        """Name of a form -> its part of the outputs."""
        places, at = {}, 0
        for name, form in self.forms.items():
            with torch.no_grad():
                width = form(self.stems[name](X[:1])).shape[1]
            places[name] = slice(at, at + width)
            at += width
        return places


def _then_linear(function: Callable[[Tensor], Tensor]) -> nn.Module:
    with torch.no_grad():
        width = function(torch.rand(1, WIDTH, SIDE, SIDE)).shape[1]
    return nn.Sequential(Function(function), nn.Linear(width, 4))


def _reductions(name: str) -> dict[str, nn.Module]:
    def reduce(x: Tensor, dims: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
        return getattr(torch, name)(x, dims, keepdim)

    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "spatial": lambda x: reduce(x, (2, 3)),
        "rows_columns": lambda x: reduce(reduce(x, 3), 2),
        "channels": lambda x: reduce(x, 1, True).flatten(1),
        "flat": lambda x: reduce(x.flatten(2), 2),
        "flat_kept": lambda x: reduce(x.flatten(2), -1, True).squeeze(2),
        "flat_relu": lambda x: reduce(x.relu().flatten(2), 2),
        "tokens": lambda x: reduce(x.flatten(2).transpose(1, 2), 1),
        "tokens_channels": lambda x: reduce(x.flatten(2).transpose(1, 2), 2),
        "channels_last": lambda x: reduce(x.permute(0, 2, 3, 1), (1, 2)),
        "float_tokens": lambda x: reduce(F.gelu(x).flatten(2), 2),
        "float_spatial": lambda x: reduce(F.gelu(x), (2, 3)),
        "float_channels": lambda x: reduce(F.gelu(x), 1, True).flatten(1),
    }
    return {key: _then_linear(function) for key, function in forms.items()}


class Parts(nn.Module):
    """A function of some layers and parameters, and of the input."""

    def __init__(self, function: Callable[[Parts, Tensor], Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _headed(*layers: nn.Module) -> nn.Module:
    body = nn.Sequential(*layers, nn.Flatten()).eval()
    with torch.no_grad():
        width = body(torch.rand(2, WIDTH, SIDE, SIDE)).shape[1]
    return nn.Sequential(body, nn.Linear(width, 4))


def _conv(inputs: int = WIDTH, outputs: int = WIDTH, kernel: int = 3, padding: int = 1, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=padding, **more)


def _tokens(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 4).flatten(2).transpose(1, 2)


def _attention(parts: Parts, x: Tensor) -> Tensor:
    x = _tokens(x)
    queries, keys, values = parts.qkv(parts.norm(x)).unsqueeze(1).chunk(3, -1)
    return (x + parts.out(F.scaled_dot_product_attention(queries, keys, values).squeeze(1))).mean(1)


def _convnext(parts: Parts, x: Tensor) -> Tensor:
    hidden = F.gelu(parts.up(parts.norm(parts.conv(x).permute(0, 2, 3, 1))))
    return parts.gamma * parts.back(hidden).permute(0, 3, 1, 2) + x


def _upsampled(parts: Parts, x: Tensor) -> Tensor:
    return torch.cat([F.interpolate(parts.down(x), scale_factor=2.0), x], 1)


def _preactivated(parts: Parts, x: Tensor) -> Tensor:
    x = x + parts.first(parts.norm1(x).relu())
    return (x + parts.second(parts.norm2(x).relu())).mean((2, 3))


def _averaged(x: Tensor) -> Tensor:
    return F.gelu(x).mean((2, 3))


def _with_class_token(parts: Parts, x: Tensor) -> Tensor:
    return torch.cat([parts.token.expand(len(x), -1, -1), _tokens(x)], 1)


def _norms() -> dict[str, nn.Module]:
    blocks = {"norm1": nn.BatchNorm2d(WIDTH), "norm2": nn.BatchNorm2d(WIDTH), "first": _conv(), "second": _conv()}
    return {
        "batch_behind_relu": _headed(nn.ReLU(), nn.BatchNorm2d(WIDTH), _conv()),
        "preactivated": _headed(Parts(_preactivated, **blocks)),
        "batch_behind_concat": _headed(
            Parts(
                lambda parts, x: parts.last(parts.norm(torch.cat([x, parts.conv(x.relu())], 1)).relu()),
                norm=nn.BatchNorm2d(2 * WIDTH), conv=_conv(), last=_conv(2 * WIDTH),
            )
        ),
        "layer_without_bias": _headed(Function(_averaged), nn.LayerNorm(WIDTH, bias=False), nn.Linear(WIDTH, 4)),
        "root_mean_square": _headed(Function(_averaged), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 4)),
        "instance": _headed(nn.InstanceNorm2d(WIDTH), _conv()),
        "instance_kept": _headed(nn.InstanceNorm2d(WIDTH, affine=True, track_running_stats=True), _conv()),
        "group": _headed(nn.GroupNorm(2, WIDTH), nn.ReLU(), _conv()),
        "transition": _headed(_conv(), nn.AvgPool2d(2), nn.BatchNorm2d(WIDTH), nn.ReLU(), _conv()),
    }  # fmt: skip


def _transformers() -> dict[str, nn.Module]:
    def linear(outputs: int = WIDTH) -> nn.Linear:
        return nn.Linear(WIDTH, outputs)

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape))

    return {
        "layer_norm": _headed(Function(_tokens), nn.LayerNorm(WIDTH), linear()),
        "class_token": _headed(Parts(_with_class_token, token=parameter(1, 1, WIDTH)), linear()),
        "class_token_alone": _headed(
            Parts(
                lambda parts, x: parts.norm(_with_class_token(parts, x) + parts.positions)[:, 0],
                token=parameter(1, 1, WIDTH), positions=parameter(1, 17, WIDTH), norm=nn.LayerNorm(WIDTH),
            )
        ),
        "attention": _headed(Parts(_attention, norm=nn.LayerNorm(WIDTH), qkv=linear(3 * WIDTH), out=linear())),
    }  # fmt: skip


def _layer_scale() -> dict[str, nn.Module]:
    """Products with constants of both signs, where they stand alone in front of a rounding or of an addition."""
    layers: dict[str, Any] = {"conv": _conv(kernel=7, padding=3, groups=WIDTH), "norm": nn.LayerNorm(WIDTH)}
    linears: dict[str, Any] = {"up": nn.Linear(WIDTH, 16), "back": nn.Linear(16, WIDTH)}

    def gamma(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape))

    def scaled(parts: Parts, x: Tensor) -> Tensor:
        return parts.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * parts.gamma

    point, pair = (WIDTH, 1, 1), {"linear": nn.Linear(WIDTH, WIDTH), "gamma": gamma(WIDTH, 1, 1)}
    head = nn.Linear(WIDTH, 4)
    return {
        "convnext": _headed(Parts(_convnext, **layers, **linears, gamma=gamma(*point))),
        "behind_linear": _headed(Parts(scaled, **pair)),
        "added": _headed(Parts(lambda parts, x: scaled(parts, x) + x, **pair)),
        "behind_mean": _headed(Parts(lambda parts, x: _averaged(x) * parts.gamma, gamma=gamma(WIDTH)), head),
        "divided": _headed(Parts(lambda parts, x: _averaged(x) / (parts.gamma * 2), gamma=gamma(WIDTH)), head),
        "rectified": _headed(Parts(lambda parts, x: (_averaged(x) * parts.gamma).relu(), gamma=gamma(WIDTH)), head),
        "behind_pool": _headed(
            Parts(lambda parts, x: F.adaptive_avg_pool2d(F.gelu(x), 4) * parts.gamma, gamma=gamma(*point)), _conv()
        ),
        "flipped": _headed(Parts(lambda parts, x: F.gelu(x).flip(3) * parts.gamma, gamma=gamma(*point)), _conv()),
    }


def _additions() -> dict[str, nn.Module]:
    """A convolution whose rounded result is changed before it is added, or added in a chain."""

    def form(function: Callable[[Parts, Tensor], Tensor], **more: nn.Module | nn.Parameter) -> nn.Module:
        changed = Parts(lambda parts, x: function(parts, x.relu()) + x, conv=_conv(), **more)
        return _headed(changed, _conv())

    def constant(low: float) -> nn.Parameter:
        return nn.Parameter(torch.rand(WIDTH, 1, 1) + low)

    return {
        "scaled": form(lambda parts, x: parts.conv(x) * parts.gamma, gamma=constant(0.2)),
        "times_number": form(lambda parts, x: parts.conv(x) * 0.7),
        "shifted": form(lambda parts, x: parts.conv(x) + parts.shift, shift=constant(-0.5)),
        "clipped": form(lambda parts, x: parts.conv(x).clamp(-0.2, 0.2)),
        "gelu": form(lambda parts, x: F.gelu(parts.conv(x))),
        "absolute": form(lambda parts, x: parts.conv(x).abs()),
        "subtracted": form(lambda parts, x: x - parts.conv(x)),
        "alpha": form(lambda parts, x: torch.add(x, parts.conv(x), alpha=0.5)),
        "three": form(lambda parts, x: parts.conv(x) + parts.other(x), other=_conv()),
        "product": form(lambda parts, x: parts.conv(x) * parts.other(x), other=_conv()),
        "constant_alone": _headed(Parts(lambda parts, x: x + parts.shift, shift=constant(-0.5)), _conv()),
    }


def _pools() -> dict[str, nn.Module]:
    pools = {
        "padded": nn.AvgPool2d(3, 2, 1),
        "padding_aside": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        "ceil": nn.AvgPool2d(3, 2, ceil_mode=True),
        "ceil_padded": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        "ceil_wide": nn.AvgPool2d(5, 3, 2, ceil_mode=True),
        "divisor": nn.AvgPool2d(2, 2, divisor_override=1),
        "divisor_padded": nn.AvgPool2d(3, 2, 1, divisor_override=5),
        "maximum_padded": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    }
    signed = {name: _headed(pool, _conv()) for name, pool in pools.items()}
    rectified = {f"{name}_relu": _headed(nn.ReLU(), pool, _conv()) for name, pool in pools.items() if "ceil" in name}
    return {**signed, **rectified}


def _others() -> dict[str, nn.Module]:
    def excited(parts: Parts, x: Tensor) -> Tensor:
        x = F.hardswish(x)
        return x * F.hardsigmoid(parts.up(parts.down(F.adaptive_avg_pool2d(x, 1)).relu()))

    def excited_behind_relu(parts: Parts, x: Tensor) -> Tensor:
        return x.relu() * torch.sigmoid(parts.up(parts.down(F.adaptive_avg_pool2d(x.relu(), 1)).relu()))

    point: dict[str, Any] = {"kernel": 1, "padding": 0}
    return {
        "pad_relu_value": _headed(Function(lambda x: F.pad(x.relu(), (1, 2, 1, 2), value=0.5)), _conv()),
        "squeeze_behind_relu": _headed(Parts(excited_behind_relu, down=_conv(**point), up=_conv(**point)), _conv()),
        "pad": _headed(Function(lambda x: F.pad(x, (1, 2, 1, 2))), _conv()),
        "pad_value": _headed(Function(lambda x: F.pad(x, (1, 2, 1, 2), value=0.5)), _conv()),
        "pad_channels": _headed(Function(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))), _conv(WIDTH + 4)),
        "squeeze_excitation": _headed(Parts(excited, down=_conv(**point), up=_conv(**point)), _conv()),
        "upsampled": _headed(
            Parts(_upsampled, down=_conv(stride=2)), _conv(2 * WIDTH)
        ),
        "shuffled": _headed(_conv(groups=2), nn.ChannelShuffle(2), _conv(groups=2)),
        "sliced": _headed(
            Parts(lambda parts, x: torch.cat([parts.conv(x[:, :4]), x[:, 4:]], 1), conv=_conv(4, 4)), _conv()
        ),
        "depthwise": _headed(_conv(groups=WIDTH), _conv(kernel=1, padding=0)),
        "one_channel": _headed(_conv(WIDTH, 1), _conv(1, WIDTH)),
    }  # fmt: skip


BUNDLES: dict[str, Callable[[], dict[str, nn.Module]]] = {
    "mean": lambda: _reductions("mean"),
    "sum": lambda: _reductions("sum"),
    "amax": lambda: _reductions("amax"),
    "amin": lambda: _reductions("amin"),
    "norms": _norms,
    "transformers": _transformers,
    "layer_scale": _layer_scale,
    "additions": _additions,
    "pools": _pools,
    "others": _others,
}


def lively_bundle(name: str) -> Bundle:
    """A bundle in evaluation mode, its norms with statistics unlike a fresh one's and weights of both signs."""
    torch.manual_seed(0)
    model = Bundle(BUNDLES[name]()).eval()
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, _NORMS) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.weight.data[::2] *= -1
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias)
    return model
