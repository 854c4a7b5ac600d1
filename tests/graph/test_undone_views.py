"""Norms over the features of tokens, as in LeViT: folded into the linear layer, and the views around them dropped."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tersenet.bricks.settle import settle
from tersenet.deploy.checked import checked
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.reference import Reference
from tersenet.graph.fold import fold_all
from tersenet.graph.trace import trace
from tersenet.quantization.quantize import Quantize
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.task import Task

X = torch.randn(16, 10, 6, generator=torch.Generator().manual_seed(0))
TASK = Task(example=X[:2], calibrate=[X], quiet=True)


class Normed(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.norm(x.flatten(0, 1)).reshape_as(x)


class Tokens(nn.Module):
    """(N, 10, 6) -> (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = Normed(6, 8), Normed(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y = self.second(x).view(len(x), 10, 2, 4).transpose(1, 2)
        x = x + y.transpose(1, 2).reshape(len(x), 10, 8)
        return self.head(x.mean(1))


def test_a_norm_behind_a_flattened_linear_layer_is_folded() -> None:
    model = Tokens().eval()
    graph = trace(copy.deepcopy(model), X[:2])
    assert fold_all(graph) == ["first.norm", "second.norm"]
    assert not [node for node in graph.graph.nodes if "flatten" in node.name or "reshape_as" in node.name]
    assert sum("transpose" in node.name for node in graph.graph.nodes) == 2  # what moves values stays
    with torch.no_grad():
        torch.testing.assert_close(graph(X), model(X))
        torch.testing.assert_close(graph(X[:3]), model(X[:3]))


def test_views_that_give_another_shape_stay() -> None:
    class Reshaped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).view(len(x), 6, 10) + x.flatten(1).view(len(x), 10, 6).transpose(1, 2)

    graph = trace(Reshaped(), X[:2])
    fold_all(graph)
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("view" in target or "flatten" in target for target in targets) == 2
    torch.testing.assert_close(graph(X), Reshaped()(X))


def test_a_shape_that_only_the_example_has_in_common_is_another() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(0, 1).view(2, -1, 6)

    x = torch.randn(6, 2, 6)
    graph = trace(Turned(), x[:2])  # (2, 2, 6), as it comes out
    fold_all(graph)
    torch.testing.assert_close(graph(x), Turned()(x))


@pytest.mark.parametrize("folded", [False, True])
def test_it_is_right_in_int8(folded: bool, tmp_path: Path) -> None:
    model: nn.Module = Tokens().eval()
    with torch.no_grad():
        expected = model(X)
    if folded:
        model, plan = FoldBatchNorm().run(model, TASK)
        assert plan
        with torch.no_grad():
            torch.testing.assert_close(model(X), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        simulated = settle(Quantize(samples=16).run(model, TASK)[0])
    path = export_onnx(simulated, X[:2], tmp_path / "q.onnx")
    found = checked(path, ["onnxruntime", "openvino"], Reference(simulated, X[:2], [X]))
    assert all(each.agrees for each in found.values())
