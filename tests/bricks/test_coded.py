"""Layers with coded weights against float twins that were given the rounded numbers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tersenet.bricks.coded import RoundedLayer, StoredLayer, rounded_kind
from tersenet.bricks.mask import Mask
from tersenet.quantization.nearest import fit_code

LAYERS = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 8, 8)),
    "linear": (lambda: nn.Linear(8, 5), (2, 8)),
}
KINDS = {
    "grid": {"bits": 3},
    "float": {"format": "fp8_e5m2"},
    "book": {"bits": 2},
    "ternary": {},
    "bases": {"count": 2},
}
CASES = [(name, kind) for name in LAYERS for kind in KINDS]


def fit(brick: RoundedLayer) -> None:
    with torch.no_grad():
        fit_code(brick.code, brick.weight)


def made(name: str, kind: str) -> tuple[nn.Module, RoundedLayer, torch.Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[name][0]()
    brick_kind = rounded_kind(layer)
    assert brick_kind is not None
    brick = brick_kind.of(layer, kind, KINDS[kind])
    fit(brick)
    return layer, brick, torch.randn(LAYERS[name][1])


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_like_a_float_layer_with_the_rounded_numbers(name: str, kind: str) -> None:
    layer, brick, x = made(name, kind)
    twin = LAYERS[name][0]()
    twin.load_state_dict({**layer.state_dict(), "weight": brick.rounded_weight().detach()})
    with torch.no_grad():
        torch.testing.assert_close(brick(x), twin(x))
        assert not torch.equal(brick(x), layer(x))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_settled_outputs_are_equal_and_codes(name: str, kind: str) -> None:
    _, brick, x = made(name, kind)
    settled = brick.settled()
    assert isinstance(settled, StoredLayer)
    assert not list(settled.parameters())
    assert torch.equal(settled(x), brick(x))
    assert settled.codes.element_size() == 1


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_config_and_state_dict_rebuild(name: str, kind: str) -> None:
    _, brick, x = made(name, kind)
    for one in (brick, brick.settled()):
        again = type(one)(**json.loads(json.dumps(one.config())))
        again.load_state_dict(one.state_dict())
        assert torch.equal(again(x), one(x))


@pytest.mark.parametrize("name", LAYERS)
def test_unquantized_is_the_layer_again(name: str) -> None:
    layer, brick, x = made(name, "book")
    before = layer(x)
    assert torch.equal(brick.unquantized()(x), before)


def test_a_mask_goes_along() -> None:
    layer = nn.Linear(8, 5)
    nn.utils.parametrize.register_parametrization(layer, "weight", Mask((5, 8)))
    layer.parametrizations["weight"][0].mask[:, :4] = False
    kind = rounded_kind(layer)
    assert kind is None or issubclass(kind, RoundedLayer)
    brick = kind.of(layer, "book", {"bits": 3})  # type: ignore[union-attr]
    fit(brick)
    assert bool((brick.rounded_weight()[:, :4] == 0).all())


def test_other_layers_have_no_twin() -> None:
    assert rounded_kind(nn.ConvTranspose2d(2, 2, 2)) is None
    assert rounded_kind(made("conv", "book")[1]) is None
