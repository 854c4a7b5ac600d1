from __future__ import annotations

import torch

from tersenet.numerics.second_order import fisher_blocks, inverse_diagonal, refit_rows, surgeon


def test_blocks_are_inverses_of_the_fisher_matrix() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(40, 10, dtype=torch.float64)
    blocks = fisher_blocks(gradients, size=4, ridge=0.1)
    whole = gradients.T @ gradients / 40
    strength = 0.1 * float(whole.trace()) / 12  # the last block is filled with zeros
    for i, place in enumerate(range(0, 8, 4)):
        part = whole[place : place + 4, place : place + 4] + strength * torch.eye(4)
        torch.testing.assert_close(blocks[i] @ part, torch.eye(4, dtype=torch.float64))
    assert inverse_diagonal(blocks, torch.Size([2, 5])).flatten()[5] == blocks[1, 1, 1]


def test_the_surgeon_finds_the_minimum_with_zeros() -> None:
    """Against least squares over the weights that stay, block by block."""
    torch.manual_seed(0)
    gradients, weight = torch.randn(60, 12, dtype=torch.float64), torch.randn(3, 4)
    stays = torch.rand(3, 4) > 0.4
    blocks = fisher_blocks(gradients, size=6)
    found = surgeon(weight, stays, blocks)
    assert found.dtype == weight.dtype
    assert torch.equal(found != 0, stays)
    for i in range(2):
        hessian = torch.linalg.inv(blocks[i])
        own, keep = weight.double().flatten()[6 * i : 6 * i + 6], stays.flatten()[6 * i : 6 * i + 6]
        free = torch.linalg.solve(hessian[keep][:, keep], hessian[keep] @ own)
        torch.testing.assert_close(found.flatten()[6 * i : 6 * i + 6][keep].double(), free, rtol=1e-5, atol=1e-6)


def test_rows_are_refitted_to_what_the_layer_gave() -> None:
    torch.manual_seed(0)
    mixing = torch.randn(5, 5)
    inputs, weight = torch.randn(200, 5) @ mixing, torch.randn(4, 5)
    stays = torch.rand(4, 5) > 0.4
    stays[0] = True
    found = refit_rows(weight, stays, inputs.T @ inputs, ridge=1e-9)
    assert torch.equal(found != 0, stays)
    torch.testing.assert_close(found[0], weight[0], rtol=1e-3, atol=1e-3)
    for row in range(4):
        keep = stays[row]
        free = torch.linalg.lstsq(inputs[:, keep], (inputs @ weight[row])[:, None]).solution[:, 0]
        torch.testing.assert_close(found[row][keep], free, rtol=1e-3, atol=1e-3)
