"""Binary bases against all combinations of signs and against least squares."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tersenet.numerics.binary import binary_scale, fitted_scales, greedy_bases, input_scales, shifted_bases, signs


def weight(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def error(x: Tensor, bases: Tensor, scales: Tensor) -> float:
    made = (bases * scales.reshape(*scales.shape, *(1,) * (x.dim() - 1))).sum(dim=0)
    return float((made - x).square().sum())


def test_the_scale_is_the_best_with_the_best_signs() -> None:
    row = weight(1, 6).double()
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)), dtype=torch.float64)
    scales = (every * row).mean(dim=1, keepdim=True)
    best = float((every * scales - row).square().sum(dim=1).min())
    assert error(row, signs(row)[None], binary_scale(row)[None]) == pytest.approx(best)


def test_scales_of_inputs_are_means_under_the_window() -> None:
    x = weight(2, 3, 5, 5)
    found = input_scales(x, (3, 3), stride=2, padding=1)
    padded = torch.nn.functional.pad(x.abs(), (1, 1, 1, 1))
    assert found.shape == (2, 1, 3, 3)
    torch.testing.assert_close(found[1, 0, 1, 2], padded[1, :, 2:5, 4:7].mean())


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_scales_are_least_squares(count: int) -> None:
    x = weight(4, 3, 3, 3)
    for bases, scales in (shifted_bases(x, count), greedy_bases(x, count)):
        assert bases.shape == (count, 4, 3, 3, 3)
        assert bool((bases.abs() == 1).all())
        for o in range(4):
            matrix = bases[:, o].reshape(count, -1).T.double()
            least = torch.linalg.lstsq(matrix, x[o].flatten()[:, None].double()).solution[:, 0]
            torch.testing.assert_close(scales[:, o].double(), least, rtol=1e-4, atol=1e-5)


def test_one_basis_is_that_of_xnor() -> None:
    x = weight(4, 9)
    bases, scales = greedy_bases(x, 1)
    assert torch.equal(bases[0], signs(x))
    torch.testing.assert_close(scales[0], binary_scale(x))


def test_more_bases_and_more_rounds_are_better() -> None:
    x = weight(4, 200)
    errors = [error(x, *greedy_bases(x, count)) for count in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    for count in (2, 3, 4):
        refined = [error(x, *greedy_bases(x, count, rounds)) for rounds in (0, 1, 5, 20)]
        assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(refined))
        assert refined[-1] < refined[0] * 0.95
    assert errors[3] < error(x, *shifted_bases(x, 4))


def test_for_given_scales_each_weight_has_the_best_signs() -> None:
    x = weight(2, 5).double()
    bases, scales = greedy_bases(x, 3, rounds=100)  # nothing moves any more
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)
    made = (bases * scales[..., None]).sum(dim=0)
    off = (every @ scales)[:, :, None] - x  # (8, 2, 5)
    torch.testing.assert_close((made - x).abs(), off.abs().amin(dim=0))


def test_equal_bases_share_their_scale() -> None:
    assert signs(torch.tensor([0.0, -0.0])).tolist() == [1.0, 1.0]
    x = torch.full((1, 4), 2.0)
    bases, scales = greedy_bases(x, 3)
    assert error(x, bases, scales) < 1e-9
    assert fitted_scales(x, torch.ones(2, 1, 4)).flatten().tolist() == pytest.approx([1.0, 1.0])
    assert error(torch.zeros(2, 4), *greedy_bases(torch.zeros(2, 4), 2)) == 0.0
