from __future__ import annotations

import numpy as np
import pytest
import torch

from tersenet.numerics.channel_saliency import (
    additions,
    chance,
    class_magnitude,
    distances,
    first_order,
    greedy,
    relative,
    second_order,
    slices,
    weighted,
)
from tersenet.numerics.elimination import Reader


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


def test_the_filter_nearest_to_the_others_has_the_least_distance() -> None:
    filters = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [10.0, 0.0]])
    expected = [sum(float((a - b).norm()) for b in filters) for a in filters]
    np.testing.assert_allclose(distances(filters.view(4, 1, 2)).numpy(), expected, rtol=1e-6)
    assert int(distances(filters).argmin()) == 1


def test_weighted_sum_and_its_ends() -> None:
    a, b = np.array([1.0, 3.0]), np.array([30.0, 10.0])
    np.testing.assert_allclose(weighted(a, b, 1.0), [0.5, 1.5])
    np.testing.assert_allclose(weighted(a, b, 0.0), [1.5, 0.5])
    np.testing.assert_allclose(weighted(a, b, 0.25), [1.25, 0.75])
    assert relative(np.zeros(2)).tolist() == [0.0, 0.0]


def test_orders_of_the_loss() -> None:
    gates = np.array([[1.0, -2.0], [-1.0, 0.0]])
    assert first_order(gates).tolist() == [1.0, 1.0]
    assert second_order(gates).tolist() == [0.5, 1.0]


def reader(seed: int = 0) -> tuple[Reader, torch.Tensor]:
    """Four channels of two inputs each, in any order, and the inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    groups = torch.tensor([[0, 5], [1, 2], [7, 3], [4, 6]])
    return Reader(inputs.T @ inputs, weight, groups), inputs


def test_greedy_takes_the_least_sum_of_what_goes() -> None:
    """ThiNet on the outputs themselves, by brute force."""
    own, inputs = reader()
    added = [inputs[:, places] @ own.weight[:, places].T for places in own.groups]  # (R, O) of each channel
    gram = additions(own)
    expected = torch.tensor([[float((a * b).sum()) for b in added] for a in added], dtype=torch.float64)
    torch.testing.assert_close(gram, expected)
    order, errors = greedy(gram.numpy())
    gone: list[int] = []
    for step in range(4):
        left = [c for c in range(4) if c not in gone]
        trials = {c: float(torch.stack([added[i] for i in [*gone, c]]).sum(dim=0).square().sum()) for c in left}
        gone.append(min(trials, key=trials.__getitem__))
        assert order[step] == gone[-1]
        np.testing.assert_allclose(errors[step], trials[gone[-1]])
