"""Codes of weights: what is rounded is what the codes say, nothing nearer was left out, gradients pass."""

from __future__ import annotations

import json

import pytest
import torch

from tersenet.bricks.codes import CODES, BasesCode, BookCode, Code, PowerCode, TernaryCode, make_code
from tersenet.quantization.nearest import fit_code

SHAPE = (6, 4, 3, 3)
KINDS = [
    ("grid", {"bits": 4}),
    ("grid", {"bits": 3, "signed": False, "granularity": 5}),
    ("grid", {"bits": 8, "signed": False, "granularity": "tensor"}),
    ("float", {"format": "fp16"}),
    ("float", {"format": "bf16"}),
    ("float", {"format": "fp8_e4m3"}),
    ("float", {"format": "fp8_e5m2"}),
    ("book", {"bits": 3}),
    ("power", {"bits": 4}),
    ("ternary", {}),
    ("bases", {"count": 2}),
    ("piece", {"length": 4, "count": 8}),
    ("piece", {"length": 6, "count": 3, "shared": False}),
]
LEVELS = {"grid": 0.08, "float": 0.02, "book": 0.06, "power": 0.15, "ternary": 0.3, "bases": 0.2, "piece": 0.9}


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def fitted(kind: str, settings: dict) -> Code:
    code = make_code(kind, SHAPE, settings)
    fit_code(code, weight())
    return code


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_codes_give_back_what_rounding_gives(kind: str, settings: dict) -> None:
    code, w = fitted(kind, settings), weight()
    codes = code.encode(w)
    made = code.round(w)
    assert torch.equal(code.decode(codes), made)
    assert codes.dtype == code.empty().dtype
    assert codes.shape == code.empty().shape
    assert torch.equal(code.round(made), made), "what is stored rounds to itself"
    error = float((made - w).square().mean() / w.square().mean())
    assert 0 < error < LEVELS[kind], error


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_settings_and_numbers_rebuild(kind: str, settings: dict) -> None:
    code = fitted(kind, settings)
    again = make_code(kind, SHAPE, json.loads(json.dumps(code.settings())))
    again.load_state_dict(code.state_dict())
    assert torch.equal(again.round(weight(1)), code.round(weight(1)))


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_gradients_pass_through_the_rounding(kind: str, settings: dict) -> None:
    code, w = fitted(kind, settings), (0.5 * weight(2)).requires_grad_()
    slope = weight(3)
    (code.round(w) * slope).sum().backward()
    assert w.grad is not None
    near = w.grad == slope
    assert float(near.float().mean()) > (0.99 if kind != "grid" else 0.8)


def test_a_table_takes_the_nearest_of_its_values() -> None:
    for code in (fitted("book", {"bits": 3}), fitted("bases", {"count": 3}), fitted("power", {"bits": 5})):
        w = weight(4)
        table = code.table()  # type: ignore[operator]
        rows = w.reshape(len(table), -1)
        nearest = (rows[..., None] - table[:, None]).abs().min(dim=-1).values
        torch.testing.assert_close((code.round(w).reshape(rows.shape) - rows).abs(), nearest)


def test_tables_hold_what_the_papers_say() -> None:
    power = PowerCode(SHAPE, bits=4)
    power.top.fill_(1)
    assert power.table()[0].tolist() == [-2, -1, -0.5, -0.25, 0, 0.25, 0.5, 1, 2]
    ties = torch.tensor([0.125, -0.125, 0.75, 1.5, 9.0]).reshape(5, 1)  # in the middle, the larger magnitude
    rounding = PowerCode((5, 1), bits=4)
    rounding.top.fill_(1)
    assert rounding.round(ties).flatten().tolist() == [0.25, -0.25, 1.0, 2.0, 2.0]
    bases = BasesCode((1, 5), count=2)
    bases.scales.copy_(torch.tensor([[2.0], [0.5]]))
    assert bases.table()[0].tolist() == [-2.5, -1.5, 1.5, 2.5]
    assert bases.signs(torch.tensor([[-3.0, -1.4, 0.2, 1.6, 3.0]]))[0].tolist() == [
        [-1, -1], [-1, 1], [1, -1], [1, -1], [1, 1],
    ]  # fmt: skip
    ternary = TernaryCode((2, 3))
    ternary.scale.copy_(torch.tensor([1.0, 3.0]))
    ternary.threshold.copy_(torch.tensor([0.5, 2.0]))
    assert ternary.round(torch.tensor([[0.4, 0.6, -0.6], [1.9, -2.1, 0.0]])).tolist() == [[0, 1, -1], [0, -3, 0]]


def test_the_gradient_of_a_shared_value_is_the_sum_over_its_weights() -> None:
    code = BookCode((2, 3), bits=1)
    code.codebook = torch.tensor([-1.0, 1.0], requires_grad=True)
    code.round(torch.tensor([[-2.0, 3.0, 0.5], [-0.1, -0.2, 4.0]])).backward(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert code.codebook.grad is not None
    assert code.codebook.grad.tolist() == [10, 11]


@pytest.mark.parametrize("kind", sorted(CODES))
def test_weights_of_zeros_and_of_one_value(kind: str) -> None:
    settings = next(settings for name, settings in KINDS if name == kind)
    for value in (0.0, 0.25):
        code = make_code(kind, SHAPE, settings)
        w = torch.full(SHAPE, value)
        fit_code(code, w)
        made = code.round(w)
        assert bool(torch.isfinite(made).all())
        torch.testing.assert_close(made, w, rtol=0.15, atol=1e-6)


def test_pruned_weights_stay_zero_in_a_codebook() -> None:
    w = weight()
    w[w.abs() < 0.7] = 0
    code = make_code("book", SHAPE, {"bits": 2})
    fit_code(code, w)
    assert torch.equal(code.round(w) == 0, w == 0)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("runes", {}),
        ("grid", {"bits": 9}),
        ("float", {"format": "fp7"}),
        ("book", {"bits": 0}),
        ("power", {"bits": 1}),
        ("bases", {"count": 0}),
        ("piece", {"length": 5, "count": 4}),
        ("piece", {"length": 4, "count": 257}),
    ],
)
def test_settings_that_there_are_not(kind: str, settings: dict) -> None:
    with pytest.raises(ValueError, match=r"must|cannot"):
        make_code(kind, SHAPE, settings)
