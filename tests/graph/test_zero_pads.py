"""Padding with zeros keeps the grid of what is padded; other padding has one of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.bricks.quantized import quantized_kind
from tersenet.graph.points import activation_points
from tersenet.graph.trace import trace


class Padded(nn.Module):
    """A padding between two convolutions."""

    def __init__(self, pad: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.pad, self.second = nn.Conv2d(3, 4, 3), pad, nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.pad(self.first(x)))


@pytest.mark.parametrize(
    ("pad", "shared"),
    [
        (lambda x: F.pad(x, (0, 1, 0, 1)), True),
        (lambda x: F.pad(x, (0, 1, 0, 1), "constant", 0.0), True),
        (lambda x: F.pad(x, (0, -1, 0, -1)), True),
        (nn.ZeroPad2d(1), True),
        (nn.ConstantPad2d(1, 0.0), True),
        (nn.ConstantPad2d(1, 0.5), False),
        (lambda x: F.pad(x, (0, 1, 0, 1), value=1.0), False),
        (lambda x: F.pad(x, (0, 1, 0, 1), "reflect"), False),
    ],
)
def test_zeros_share_the_grid(pad: Callable[[Tensor], Tensor], shared: bool) -> None:
    graph = trace(Padded(pad).eval(), torch.randn(2, 3, 8, 8))
    quantized = {path for path, layer in graph.named_modules() if quantized_kind(layer) is not None}
    groups = [set(group) for group in activation_points(graph, quantized).groups.values()]
    layers = {str(node.target): node for node in graph.graph.nodes if node.op == "call_module"}
    first, padded = layers["first"].name, layers["second"].args[0].name
    assert any({first, padded} <= group for group in groups) == shared
