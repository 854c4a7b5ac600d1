"""Layers of few values: the values of each rule, whole numbers, gains, and what settling gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tersenet.bricks.few_bits import FewBitConv2d, FewBitLayer, few_bit_kind
from tersenet.bricks.mask import attach
from tersenet.bricks.quantized import Int8Conv2d, Int8Linear
from tersenet.bricks.weight_rules import RULES

BITS = {"lsq": (2, 3, 4, 8), "dorefa": (2, 3, 7)}


def layer(kind: str = "conv") -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(4, 6, 3, padding=1) if kind == "conv" else nn.Linear(5, 6)


def brick(rule: str, bits: int = 4, granularity: str = "channel", kind: str = "conv") -> FewBitLayer:
    source = layer(kind)
    found = few_bit_kind(source)
    assert found is not None
    made = found.of(source, rule, bits, granularity)
    made.start()
    return made


def x_of(kind: str = "conv") -> torch.Tensor:
    return torch.randn(2, 4, 6, 6) if kind == "conv" else torch.randn(2, 5)


@pytest.mark.parametrize(("rule", "bits"), [(r, b) for r in RULES for b in BITS.get(r, (1,))])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_values_are_whole_numbers_times_scales(rule: str, bits: int, granularity: str) -> None:
    made = brick(rule, bits, granularity)
    values = made.rounded_weight().detach()
    found = RULES[rule].integers(made)
    if found is None:
        assert rule in ("ttq", "real")
        return
    steps, scale = found
    assert scale.shape == (6,)
    assert bool((scale > 0).all())
    assert torch.equal(steps, steps.round())
    assert float(steps.abs().max()) <= 127
    torch.testing.assert_close(steps * scale.view(-1, 1, 1, 1), values, rtol=1e-5, atol=1e-7)
    counts = {"bnn": 2, "bwn": 2, "magnitude_aware": 2, "twn": 3, "twn_exact": 3}
    assert len(steps.unique()) <= counts.get(rule, 2**bits)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "bnn"])
def test_a_channel_of_zeros_stays_one_when_settled(rule: str) -> None:
    made = brick(rule)
    with torch.no_grad():
        made.weight[1] = 0
    made.eval()
    x = x_of()
    with torch.no_grad():
        wanted = made(x)
    if rule != "dorefa":  # none of its values is zero
        torch.testing.assert_close(wanted[:, 1], made.bias[1].expand_as(wanted[:, 1]))
    torch.testing.assert_close(made.settled(None)(x), wanted, rtol=1e-4, atol=1e-5)


def test_ttq_has_three_values_for_the_layer() -> None:
    made = brick("ttq")
    with torch.no_grad():
        made.positive.fill_(0.3)
        made.negative.fill_(0.1)
    assert made.rounded_weight().unique().tolist() == pytest.approx([-0.1, 0.0, 0.3])


def test_ttq_trains_small_weights_at_their_own_speed() -> None:
    made = brick("ttq")
    with torch.no_grad():
        made.positive.fill_(0.003)
        made.negative.fill_(0.001)
    made.rounded_weight().sum().backward()
    signs = made.rounded_weight().sign()
    expected = torch.where(signs > 0, 1.5, torch.where(signs < 0, 0.5, 1.0))
    torch.testing.assert_close(made.weight.grad, expected)
    torch.testing.assert_close(made.positive.grad, (signs > 0).sum() / made.weight.numel() ** 0.5)


def test_twn_is_the_paper_s_rule() -> None:
    made = brick("twn", granularity="tensor")
    weight = made.weight.detach()
    beyond = weight.abs() > 0.7 * weight.abs().mean()
    expected = torch.where(beyond, weight.sign() * weight.abs()[beyond].mean(), 0.0)
    torch.testing.assert_close(made.rounded_weight().detach(), expected)
    made.rounded_weight().sum().backward()
    assert torch.equal(made.weight.grad, torch.ones_like(weight))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_norm_folds_exactly_and_settles(rule: str, kind: str) -> None:
    made = brick(rule, kind=kind).eval()
    x = x_of(kind)
    factor, shift = torch.tensor([0.5, -2.0, 1e-3, 1.0, -0.1, 3.0]).double(), torch.arange(6.0).double()
    shape = (1, -1, 1, 1) if kind == "conv" else (1, -1)
    expected = made(x) * factor.view(shape).float() + shift.view(shape).float()
    folded = copy.deepcopy(made)
    folded.absorb(factor, shift)
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)
    rebuilt = type(folded)(**folded.config())
    rebuilt.load_state_dict(folded.state_dict())
    assert torch.equal(rebuilt(x), folded(x))
    settled = folded.settled(None)
    torch.testing.assert_close(settled(x), expected, rtol=1e-4, atol=1e-5)
    whole = isinstance(settled, Int8Conv2d | Int8Linear)
    assert whole == (rule not in ("ttq", "real"))


def test_with_an_input_scale_the_bias_is_an_integer() -> None:
    made = brick("lsq", 4).eval()
    x = x_of()
    settled = made.settled(torch.tensor(0.01))
    assert settled.bias.dtype == torch.int32
    torch.testing.assert_close(settled(x), made(x), rtol=1e-3, atol=1e-3)


def test_a_bias_of_a_tiny_channel_stays_inside_of_int32() -> None:
    made = brick("lsq", 4).eval()
    made.absorb(torch.full((6,), 1e-9).double(), torch.full((6,), 5.0).double())
    settled = made.settled(torch.tensor(0.01))
    assert int(settled.bias.abs().max()) <= 2**30 + 1
    torch.testing.assert_close(settled(x_of()), made(x_of()), rtol=1e-4, atol=1e-4)


def test_a_mask_stays_and_its_zeros_are_zeros() -> None:
    source = layer()
    mask = attach(source)
    mask.mask[0] = False
    made = FewBitConv2d.of(source, "lsq", 4)
    made.start()
    values = made.rounded_weight().detach().abs()
    assert float(values[0].max()) == 0
    assert float(values[1].max()) > 0


def test_frozen_weights_get_no_gradient() -> None:
    made = brick("lsq")
    made.frozen = True
    (made(x_of()).sum() * 1.0).backward()
    assert made.weight.grad is None
    assert made.step.grad is None
    assert made.bias.grad is not None


def test_making_one_draws_nothing() -> None:
    source = layer()
    before = torch.random.get_rng_state()
    FewBitConv2d.of(source, "lsq", 4)
    assert torch.equal(before, torch.random.get_rng_state())


def test_layers_without_a_twin() -> None:
    assert few_bit_kind(nn.ConvTranspose2d(2, 2, 1)) is None
    assert few_bit_kind(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")) is None
    assert few_bit_kind(brick("lsq")) is None
