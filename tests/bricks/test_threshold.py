"""Thresholds against their definition, in torch's own words."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from tersenet.bricks.threshold import Threshold
from tersenet.graph.surgery import axes


def test_it_is_torchs_threshold_where_values_are_positive() -> None:
    x = torch.relu(torch.randn(3, 4, 5, 5))
    brick = Threshold()
    brick.threshold.fill_(0.7)
    assert torch.equal(brick(x), F.threshold(x, 0.7, 0.0))


def test_signed_values_are_cut_by_their_size() -> None:
    brick = Threshold(signed=True)
    brick.threshold.fill_(0.5)
    assert brick(torch.tensor([-2.0, -0.5, 0.1, 0.5, 0.6])).tolist() == [-2.0, 0.0, 0.0, 0.0, 0.6000000238418579]


def test_each_channel_has_its_own() -> None:
    brick = Threshold(num_features=2)
    brick.threshold.copy_(torch.tensor([0.0, 1.0]))
    for shape in ((2, 2), (2, 2, 3), (2, 2, 3, 3)):
        x = torch.rand(shape)
        assert torch.equal(brick(x)[:, 0], x[:, 0])
        assert not brick(x)[:, 1].any()


def test_zero_changes_nothing_and_nan_is_not_hidden() -> None:
    x = torch.randn(100)
    assert torch.equal(Threshold(signed=True)(x), x)
    assert torch.equal(Threshold()(torch.relu(x)), torch.relu(x))
    assert math.isnan(Threshold()(torch.tensor([math.nan]))[0])


def test_the_gradient_is_that_of_what_is_kept() -> None:
    x = torch.tensor([0.2, 0.8], requires_grad=True)
    brick = Threshold()
    brick.threshold.fill_(0.5)
    brick(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0]


def test_it_says_how_it_is_built_and_where_it_can_be_cut() -> None:
    brick = Threshold(num_features=3)
    assert Threshold(**brick.config()).threshold.shape == (3,)
    assert axes(brick)["channel"].tensors.keys() >= {"threshold"}
    assert axes(Threshold()) == {}
