"""Short floats against the list of all their values, made from the meaning of their bits."""

from __future__ import annotations

import math

import pytest
import torch

from tersenet.numerics.float_formats import FLOATS, encode, float_scale, highest, round_float

# name: bits of the exponent, bits of the mantissa, bias, exponent all ones means no number
BITS = {
    "fp8_e4m3": (4, 3, 7, False),
    "fp8_e5m2": (5, 2, 15, True),
    "fp16": (5, 10, 15, True),
    "bf16": (8, 7, 127, True),
}


def finite(kind: str) -> dict[int, float]:
    """Code -> value, for all codes without a sign that are finite numbers."""
    exponent, mantissa, bias, reserved = BITS[kind]
    found = {}
    for code in range(2 ** (exponent + mantissa)):
        e, m = divmod(code, 2**mantissa)
        if (reserved and e == 2**exponent - 1) or (not reserved and code == 2 ** (exponent + mantissa) - 1):
            continue
        found[code] = math.ldexp(m + (2**mantissa if e else 0), max(e, 1) - bias - mantissa)
    return found


def codes(kind: str, x: torch.Tensor) -> torch.Tensor:
    bytes_each = FLOATS[kind].itemsize
    return encode(x, kind).view(torch.uint8 if bytes_each == 1 else torch.int16).long()


@pytest.mark.parametrize("kind", BITS)
def test_every_value_keeps_its_bits(kind: str) -> None:
    known = finite(kind)
    x = torch.tensor(list(known.values()), dtype=torch.float32)
    assert torch.equal(codes(kind, x), torch.tensor(list(known)))
    assert torch.equal(round_float(x, kind), x)
    assert torch.equal(round_float(-x, kind), -x)
    assert highest(kind) == max(known.values())


@pytest.mark.parametrize("kind", BITS)
def test_between_two_values_the_nearest_and_of_two_the_even_one(kind: str) -> None:
    known = list(finite(kind).items())
    below = torch.tensor([value for _, value in known[:-1]], dtype=torch.float64)
    above = torch.tensor([value for _, value in known[1:]], dtype=torch.float64)
    code = torch.tensor([code for code, _ in known[:-1]])
    middle = ((below + above) / 2).float()
    assert torch.equal(middle.double(), (below + above) / 2)  # float32 holds the middles
    even = torch.where(code % 2 == 0, code, code + 1)
    assert torch.equal(codes(kind, middle), even)
    assert torch.equal(codes(kind, torch.nextafter(middle, torch.tensor(0.0))), code)
    assert torch.equal(codes(kind, torch.nextafter(middle, torch.tensor(math.inf))), code + 1)


@pytest.mark.parametrize("kind", BITS)
def test_what_is_too_large_becomes_the_largest(kind: str) -> None:
    top = highest(kind)
    x = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38])
    made = round_float(x, kind)
    assert made[0] == top
    assert made[1] == -top
    assert math.isnan(made[2])
    # bf16 reaches nearly as far as float32.
    assert made[3] == (round_float(torch.tensor(3e38), kind) if kind == "bf16" else top)
    assert made[3] == -made[4]


def test_the_gradient_is_one_inside_and_zero_outside() -> None:
    x = torch.tensor([1.3, -500.0, 448.0, 449.0], requires_grad=True)
    round_float(x, "fp8_e4m3").backward(torch.tensor([2.0, 3.0, 5.0, 7.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 0.0, 5.0, 0.0]


def test_scales_are_powers_of_two_and_use_the_range() -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-6], [1.0], [1e4], [0.0], [448]]
    )
    x[4, 0] = 448.0
    scale = float_scale(x, "fp8_e4m3")
    assert torch.equal(torch.frexp(scale).mantissa, torch.full((5,), 0.5))
    largest = (x / scale[:, None]).abs().amax(dim=1)
    assert bool(((largest > 224) & (largest <= 448))[[0, 1, 2]].all())
    assert scale[3] == 1
