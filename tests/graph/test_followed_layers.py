"""Layers of torch.nn that are followed as the operators they are made of, and what counts as a residual addition."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.graph.coupling import Coupling, coupling
from tersenet.graph.recut import recut

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor], int]] = {
    "GLU": (lambda: nn.GLU(1), lambda y: F.glu(y, 1), 4),
    "PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), lambda y: F.pixel_unshuffle(y, 2), 32),
    "CircularPad2d": (lambda: nn.CircularPad2d(1), lambda y: F.pad(y, (1,) * 4, mode="circular"), 8),
    "Unflatten": (
        lambda: nn.Sequential(nn.Unflatten(1, (4, 2)), nn.Flatten(1, 2)),
        lambda y: y.unflatten(1, (4, 2)).flatten(1, 2),
        8,
    ),
    "LayerNorm_of_images": (lambda: nn.LayerNorm((8, 8)), lambda y: F.layer_norm(y, (8, 8)), 8),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(3), lambda y: F.adaptive_max_pool2d(y, 3), 8),
    "LayerNorm_of_rows": (lambda: nn.LayerNorm(8), lambda y: F.layer_norm(y, (8,)), 8),
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), lambda y: F.channel_shuffle(y, 2), 8),
}


class Between(nn.Module):
    """conv - something - conv. (N, 3, 8, 8) -> (N, 4, H, W)."""

    def __init__(self, inside: Callable[[Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(channels, 4, 1)
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inside(self.first(x)))


class Drawn(nn.Module):
    """What a linear layer gives is an image, over whose rows and columns a depthwise convolution moves."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.first, self.moves = nn.Linear(10, 144), nn.Conv2d(4, 8, 3, stride, 1, groups=4)
        self.last = nn.Linear(8 * (6 // stride) ** 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.moves(self.first(x).reshape(-1, 4, 6, 6)).flatten(1))


def cut_equals_zeros(model: nn.Module, x: Tensor) -> Coupling:
    """Cuts every second channel of everything, and compares with the network whose last layer does not read them."""
    known = coupling(model, x)
    assert known.bundles, known.frozen
    removed = np.concatenate([bundle.classes[::2] for bundle in known.bundles])
    with torch.no_grad():
        small = recut(copy.deepcopy(model), known.plan(model, removed)).eval()
        twin = copy.deepcopy(model)
        gone = known.gone(removed)
        last = twin.get_submodule("last")
        last.weight[:, torch.from_numpy(gone[known.slots["last", "in"]])] = 0  # type: ignore[index, union-attr, operator]
        torch.testing.assert_close(small(x), twin(x), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    return known


@pytest.mark.parametrize("stride", [1, 2])
def test_a_depthwise_convolution_moves_over_rows_and_columns(stride: int) -> None:
    torch.manual_seed(0)
    known = cut_equals_zeros(Drawn(stride).eval(), torch.randn(2, 10))
    assert "first" not in known.frozen, known.frozen


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_cut_like_its_function(name: str) -> None:
    make, function, channels = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    sizes = []
    for inside in (make(), function):
        model = Between(inside, channels).eval()
        known = cut_equals_zeros(model, x)
        assert "first" not in known.frozen, known.frozen
        sizes.append([len(bundle.classes) for bundle in known.bundles])
    assert sizes[0] == sizes[1]


class Unpooled(Between):
    """The channels of a max pooling that is undone. (N, 3, 8, 8) -> (N, 4, 8, 8)."""

    def __init__(self) -> None:
        super().__init__(nn.MaxUnpool2d(2), 8)
        self.pool = nn.MaxPool2d(2, return_indices=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inside(*self.pool(self.first(x))))


class Placed(nn.Module):
    """Tokens with a learned place each. (N, 3, 8, 8) -> (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.places, self.last = nn.Conv2d(3, 8, 4, 4), nn.Embedding(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first(x).flatten(2).mT + self.places(torch.arange(4))
        return self.last(tokens.mean(1))


@pytest.mark.parametrize("make", [Unpooled, Placed])
def test_unpooling_and_positions_are_cut(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    assert "first" not in cut_equals_zeros(make().eval(), torch.randn(2, 3, 8, 8)).frozen


class Sum(nn.Module):
    """A sum of what `parts` makes of channels. (N, 3, 8, 8) -> (N, 2, 8, 8)."""

    def __init__(self, parts: Callable[[Sum, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b, self.c = (nn.Conv2d(8, 8, k, padding=k // 2) for k in (3, 3, 1))
        self.norm, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        self.own = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.register_buffer("still", torch.randn(8, 1, 1))
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.parts(self, self.first(x)).relu())


SUMS: dict[str, tuple[Callable[[Sum, Tensor], Tensor], bool]] = {
    "parameter": (lambda m, y: m.a(y) + m.own, False),
    "buffer": (lambda m, y: m.a(y) * m.own + m.still, False),
    "parallel": (lambda m, y: m.norm(m.a(y)) + m.c(y), False),
    "of the input": (lambda m, y: m.a(y) + m.b(y.relu()), False),
    "identity": (lambda m, y: y + m.b(m.a(y).relu()), True),
    "projection": (lambda m, y: m.c(y) + m.b(m.a(y).relu()), True),
    "scaled identity": (lambda m, y: m.norm(y) + m.a(y), True),
    "minus": (lambda m, y: y - m.a(y), True),
}


@pytest.mark.parametrize("name", SUMS)
def test_only_a_shortcut_makes_an_addition_residual(name: str) -> None:
    parts, residual = SUMS[name]
    known = coupling(Sum(parts).eval(), torch.randn(2, 3, 8, 8))
    found = any(bundle.residual for bundle in known.bundles)
    assert found == residual


def test_a_pointwise_operator_of_two_outputs_stops_channels_and_nothing_else() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            mantissa, _ = torch.frexp(self.first(x))
            return self.last(self.middle(mantissa))

    known = coupling(Parts().eval(), torch.randn(2, 3, 8, 8))
    assert "frexp" in known.frozen["first"]
    assert [bundle.members for bundle in known.bundles] == [(("middle", "out"), ("last", "in"))]
