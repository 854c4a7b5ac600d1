"""Rows that layers read, against unfolding whole images."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersenet.graph import rows

LAYERS = {
    "plain": nn.Conv2d(3, 4, 3),
    "padded and strided": nn.Conv2d(3, 4, 3, stride=2, padding=1),
    "uneven": nn.Conv2d(3, 4, (3, 2), stride=(1, 3), padding=(2, 1), dilation=(1, 2)),
    "pointwise": nn.Conv2d(3, 4, 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_weight_are_the_outputs(name: str) -> None:
    layer, x = LAYERS[name], torch.randn(5, 3, 9, 11)
    out = F.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation).detach()
    count = out[0, 0].numel()
    chosen = torch.randperm(count)[:7].sort().values
    found = rows.read(x, layer, chosen)
    assert found.shape == (5 * 7, layer.weight[0].numel())
    given = rows.given(out, layer, chosen)
    torch.testing.assert_close(found @ layer.weight.detach().flatten(1).T, given, rtol=1e-4, atol=1e-5)
    unfolded = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)[:, :, chosen]  # type: ignore[arg-type]
    assert torch.equal(found, unfolded.transpose(1, 2).flatten(0, 1))


def test_rows_of_a_linear_layer_are_its_inputs() -> None:
    x = torch.randn(4, 6)
    assert torch.equal(rows.read(x, nn.Linear(6, 2), torch.arange(1)), x)
