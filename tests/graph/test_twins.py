"""What is computed twice is merged where it is the same, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tersenet import Quantize, Task
from tersenet.bricks.quantizer import Quantizer
from tersenet.graph.trace import trace
from tersenet.graph.twins import merge_twins

X = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(0))


class Gated(nn.Module):
    """Squeeze and excitation around two rectifiers of one value, as functions or as one layer."""

    def __init__(self, layer: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.squeeze, self.last = nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)
        self.act = nn.ReLU() if layer else torch.relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.act(x) * self.squeeze(self.act(x).mean((2, 3), keepdim=True)).sigmoid())


class Others(nn.Module):
    """Operators of one value that are not the same."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)
        self.scale, self.shift = nn.PReLU(init=0.3), nn.PReLU(init=0.4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.clamp(max=0.5) + x.clamp(max=0.6) + x.softmax(1) + x.softmax(2)
        return rows + self.a(x) + self.b(x) + self.scale(x) + self.shift(x) + (x + 1.0) * (x + 2.0)


@pytest.mark.parametrize("layer", [True, False])
def test_activations_of_one_value_are_merged_and_rounded_once(layer: bool) -> None:
    model = Gated(layer).eval()
    graph = trace(model, X)
    wanted, before = graph(X), len(graph.graph.nodes)
    merge_twins(graph)
    assert len(graph.graph.nodes) == before - 1
    assert torch.equal(graph(X), wanted)
    quantized, _ = Quantize().run(model, Task(example=X, calibrate=[(X,)], quiet=True))
    names = [name for name, module in quantized.named_modules() if isinstance(module, Quantizer)]
    assert not any("first" in name for name in names), names  # the convolution is rounded behind its activation alone


def test_others_stay_as_they_are() -> None:
    graph = trace(Others().eval(), X)
    wanted, before = graph(X), len(graph.graph.nodes)
    merge_twins(graph)
    assert len(graph.graph.nodes) == before
    assert torch.equal(graph(X), wanted)
