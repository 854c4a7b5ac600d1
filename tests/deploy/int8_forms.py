"""Small forms of what stands in networks, each between quantized layers, bundled so that an export serves several."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH, SIDE = 8, 16
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
        "float_tokens": lambda x: reduce(nn.functional.gelu(x).flatten(2), 2),
    }
    return {key: _then_linear(function) for key, function in forms.items()}


BUNDLES: dict[str, Callable[[], dict[str, nn.Module]]] = {
    "mean": lambda: _reductions("mean"),
    "sum": lambda: _reductions("sum"),
    "amax": lambda: _reductions("amax"),
    "amin": lambda: _reductions("amin"),
}


def lively_bundle(name: str) -> Bundle:
    """A bundle in evaluation mode, its norms with statistics that are not those of a fresh one."""
    torch.manual_seed(0)
    model = Bundle(BUNDLES[name]()).eval()
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model
