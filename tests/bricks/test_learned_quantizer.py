"""Learned ranges of activations: values, and the gradients of the scale against the formulas of the papers."""

from __future__ import annotations

import pytest
import torch

from tersenet.bricks.learned_quantizer import LearnedQuantizer


def made(method: str, zero_point: int = 0) -> LearnedQuantizer:
    brick = LearnedQuantizer(3, method)
    with torch.no_grad():
        brick.scale.fill_(0.5)
        brick.zero_point.fill_(zero_point)
    return brick


X = torch.tensor([[-3.0, -0.4, 0.1, 0.8, 1.3, 3.4, 9.0]])


@pytest.mark.parametrize("zero_point", [0, 3])
@pytest.mark.parametrize("method", ["lsq", "pact", "dorefa"])
def test_values_are_the_same_with_and_without_gradients(method: str, zero_point: int) -> None:
    brick = made(method, zero_point)
    expected = ((X / 0.5).round() + zero_point).clamp(0, 7).sub(zero_point) * 0.5
    with torch.no_grad():
        assert torch.equal(brick(X), expected)
    assert torch.equal(brick(X.clone().requires_grad_()).detach(), expected)
    assert torch.equal(brick.plain()(X), expected)


def test_pact_pulls_the_ceiling_by_what_lies_above() -> None:
    brick, x = made("pact"), X.clone().requires_grad_()
    brick(x).sum().backward()
    # Ceiling 3.5: 9.0 lies above it. dy/ds = 7 for each such value.
    assert float(brick.scale.grad) == pytest.approx(7.0)
    assert x.grad.tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]]


def test_lsq_has_the_paper_s_slope() -> None:
    brick, x = made("lsq"), X.clone().requires_grad_()
    brick(x).sum().backward()
    slope = sum(round(v / 0.5) - v / 0.5 for v in (0.1, 0.8, 1.3, 3.4)) + 0 + 0 + 7  # two below, one above
    assert float(brick.scale.grad) == pytest.approx(slope / (7 * 7) ** 0.5, rel=1e-5)


def test_dorefa_s_range_stands_still() -> None:
    brick = made("dorefa")
    assert not brick.scale.requires_grad


def test_the_zero_point_is_seen_when_it_changes() -> None:
    brick = made("lsq")
    brick(X.clone().requires_grad_())
    brick.load_state_dict({"scale": torch.tensor(0.5), "zero_point": torch.tensor(4, dtype=torch.uint8)})
    assert float(brick(X.clone().requires_grad_()).min().detach()) == -2.0


def test_a_scale_that_became_negative_counts_by_its_size() -> None:
    brick = made("lsq")
    expected = brick(X).detach()
    with torch.no_grad():
        brick.scale.neg_()
    assert torch.equal(brick(X).detach(), expected)
