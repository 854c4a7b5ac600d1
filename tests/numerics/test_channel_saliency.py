from __future__ import annotations

import numpy as np
import pytest
import torch

from tersenet.numerics.channel_saliency import chance, class_magnitude, slices


@pytest.mark.parametrize("dim", [0, 1, 3])
def test_slices_are_sums(dim: int) -> None:
    weight = torch.randn(4, 3, 2, 5)
    expected = [sum(weight.select(dim, i).flatten().tolist()) for i in range(weight.shape[dim])]
    torch.testing.assert_close(slices(weight, dim), torch.tensor(expected))
    assert slices(torch.tensor([1.0, 9.0]), 0).tolist() == [1.0, 9.0]


def test_layers_count_alike_whatever_their_size() -> None:
    small, large = np.array([1.0, 3.0]), np.array([3000.0, 1000.0])
    both = class_magnitude([(small, np.array([0, 1])), (large, np.array([0, 1]))], 2, power=1)
    assert both.tolist() == [2.0, 2.0]
    # a channel that owns several positions of a layer has their sum
    spread = class_magnitude([(np.array([1.0, 1.0, 2.0, 4.0]), np.array([0, 0, 1, 1]))], 3, power=2)
    np.testing.assert_allclose(spread, [np.sqrt(0.5), np.sqrt(1.5), 0.0])
    assert class_magnitude([], 2, power=2).tolist() == [0.0, 0.0]


def test_chance_is_repeatable() -> None:
    assert (chance(5, 1) == chance(5, 1)).all()
    assert (chance(5, 1) != chance(5, 2)).all()
