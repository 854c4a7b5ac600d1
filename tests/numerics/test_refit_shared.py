"""Shared values by least squares, against a solver that knows nothing of codes."""

from __future__ import annotations

import pytest
import torch

from tersenet.numerics.refit_shared import refit_shared


def inputs(groups: int = 1) -> torch.Tensor:
    """(G, R, I) correlated rows."""
    source = torch.Generator().manual_seed(0)
    return torch.randn(groups, 400, 6, generator=source, dtype=torch.float64).cumsum(dim=-1)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_codebook_is_that_of_plain_least_squares(groups: int) -> None:
    x, source = inputs(groups), torch.Generator().manual_seed(1)
    weight = torch.randn(groups, 4, 6, generator=source, dtype=torch.float64)
    codes = torch.randint(3, weight.shape, generator=source)
    design = torch.nn.functional.one_hot(codes, 3)
    found = refit_shared(weight, design, x.mT @ x, torch.zeros(1, 3, dtype=torch.float64), damping=1e-12)
    # rows of outputs: x w' = sum over values of (x one-hot') value
    matrix = torch.einsum("gri,goik->grok", x, design.double()).reshape(-1, 3)
    wanted = torch.einsum("gri,goi->gro", x, weight).reshape(-1, 1)
    torch.testing.assert_close(found, torch.linalg.lstsq(matrix, wanted).solution.T)


def test_scales_of_each_output_are_those_of_plain_least_squares() -> None:
    x, source = inputs(), torch.Generator().manual_seed(2)
    weight = torch.randn(1, 4, 6, generator=source, dtype=torch.float64)
    signs = 2 * torch.randint(2, (1, 4, 6, 2), generator=source) - 1
    found = refit_shared(weight, signs, x.mT @ x, torch.ones(4, 2, dtype=torch.float64), damping=1e-12)
    for row in range(4):
        solution = torch.linalg.lstsq(x[0] @ signs[0, row].double(), x[0] @ weight[0, row][:, None]).solution
        torch.testing.assert_close(found[row], solution[:, 0])


def test_a_value_that_nothing_uses_stays() -> None:
    x = inputs()
    design = torch.nn.functional.one_hot(torch.zeros(1, 2, 6, dtype=torch.long), 3)
    found = refit_shared(torch.randn(1, 2, 6).double(), design, x.mT @ x, torch.tensor([[5.0, 6.0, 7.0]]))
    assert found[0, 1:].tolist() == [6.0, 7.0]
    assert found[0, 0] != 5.0
