"""Operators under other names are captured as the operators that they stand for, or are made of."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersenet.deploy.artifact import load_terse, save_terse
from tersenet.errors import TraceError
from tersenet.graph.coupling import coupling
from tersenet.graph.recut import recut
from tersenet.graph.trace import fixed_batch, trace

X = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, middle) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.middle = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), middle
        self.head = nn.LazyConv2d(4, 1)
        self(X)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.a(x), self.b(x))).mean((2, 3))


CASES = {
    "an alias": (lambda x, y: torch.multiply(torch.absolute(x), y), {"aten.abs.default", "aten.mul.Tensor"}),
    "a second name with another argument": (
        lambda x, y: torch.divide(torch.clip(x, -0.5), 2.0), {"aten.clamp.default", "aten.div.Tensor"}
    ),
    "one of several parts": (lambda x, y: torch.hstack([x, y]), {"aten.cat.default"}),
    "a composite of composites": (
        lambda x, y: x * F.cosine_similarity(x, y).unsqueeze(1), {"aten.clamp_min.Tensor", "aten.sum.dim_IntList"}
    ),
    "in place, of another type": (lambda x, y: y * x.gt_(0.1), {"aten.gt.Scalar", "aten.to.dtype"}),
    "in place, under another name": (lambda x, y: x.pow_(2).mul(y), {"aten.pow.Tensor_Scalar"}),
    "in place": (lambda x, y: x.atan_().mul(y), {"aten.atan.default", "aten.mul.Tensor"}),
}  # fmt: skip


@pytest.mark.parametrize(("middle", "operators"), CASES.values(), ids=CASES)
def test_composites_are_captured_as_their_parts_written_and_cut(middle, operators, tmp_path):
    model = Net(middle).eval()
    graph = trace(model, X[:2])
    assert operators <= {str(node.target) for node in graph.graph.nodes}
    assert torch.allclose(graph(X), model(X), atol=1e-6)
    save_terse(model, X[:2], tmp_path / "a.terse")
    assert torch.allclose(load_terse(tmp_path / "a.terse")(X), model(X), atol=1e-6)
    known = coupling(model, X[:2])
    assert "a" not in known.frozen
    removed = np.concatenate([bundle.classes[:3] for bundle in known.bundles])
    small = recut(copy.deepcopy(model), known.plan(model, removed)).eval()
    assert small.get_submodule("a").weight.shape[0] == 5
    assert small(X).shape == model(X).shape


def test_what_is_known_as_it_is_stays():
    model = Net(lambda x, y: F.softmax(F.layer_norm(x, x.shape[2:]), 1) + F.relu_(y)).eval()
    names = {str(node.target) for node in trace(model, X[:2]).graph.nodes}
    assert {"aten.softmax.int", "aten.layer_norm.default", "aten.relu_.default"} <= names


@pytest.mark.parametrize("name", ["inverse", "quantile"])
def test_what_torch_cannot_take_apart_stays(name):
    functions = {
        "inverse": lambda x, y: torch.inverse(x @ x.mT + torch.eye(6)),
        "quantile": lambda x, y: torch.quantile(x, 0.5, dim=1, keepdim=True),
    }
    model = Net(functions[name]).eval()
    graph = trace(model, X[:2])
    assert torch.allclose(graph(X), model(X), atol=1e-5)


def test_a_size_that_depends_on_values_is_refused_in_a_sentence():
    with pytest.raises(TraceError, match="makes a tensor whose size depends on values"):
        trace(Net(lambda x, y: x * torch.masked_select(x, x > 0).sum()).eval(), X[:2])


def test_a_batch_that_torch_fixes_is_said_without_a_line_of_torch():
    graph = trace(Net(lambda x, y: torch.kron(x, torch.ones(1, 1, 2, 2))).eval(), X[:2])
    assert "the forward of Net fixes the batch at 2; use x.shape[0]" in (fixed_batch(graph) or "")


class ByHand(nn.Module):
    """A norm whose tensors are given to a function, before and after an operator that is taken apart."""

    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.function = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), function
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self.norm, self.conv(x)).mean((2, 3))
        return y + F.one_hot(y.argmax(1), 8).to(y.dtype)


BY_HAND = {
    "batch norm": lambda m, x: F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias),
    "called": lambda m, x: m(x),
    "with its statistics": lambda m, x: torch.native_batch_norm(
        x, m.weight, m.bias, m.running_mean, m.running_var, False, 0.1, 1e-3
    )[0],
    "group norm with its statistics": lambda m, x: sum(
        part.mean() * x
        for part in torch.native_group_norm(x, m.weight, m.bias, len(x), 8, x.shape[2] * x.shape[3], 2, 1e-3)[1:]
    ),
    "largest with their places": lambda m, x: torch.max(x.movedim(1, -1) * m.weight, 3, keepdim=True)[0].movedim(-1, 1),
    "a size": lambda m, x: x * m.weight.size(0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_operators_of_several_outputs_on_a_layer_s_tensors_are_captured(name):
    model = ByHand(BY_HAND[name]).eval()
    graph = trace(model, X)
    torch.testing.assert_close(graph(X), model(X))
    norms = [node for node in graph.graph.nodes if node.target == "norm"]
    assert len(norms) == (name in ("batch norm", "called", "with its statistics"))
