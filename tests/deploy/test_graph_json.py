"""Graphs as JSON: what goes in computes the same when it comes out, and a hostile graph is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.bricks.shortcut import PadShortcut
from tersenet.deploy import layer_table
from tersenet.deploy.graph_json import from_json, to_json
from tersenet.errors import ExportError
from tersenet.graph.trace import trace


class Everything(nn.Module):
    """Layers, a brick, operators, a parameter, a buffer, a constant, sizes, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.shortcut = PadShortcut(2, 4, 4)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1, padding_mode="reflect")
        self.twice = nn.Conv2d(16, 16, 1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 10)
        self.scale = nn.Parameter(torch.full((1,), 1.5))
        self.frozen = nn.Parameter(torch.full((1,), 0.5), requires_grad=False)
        self.register_buffer("offset", torch.linspace(0, 1, 16).reshape(16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.down(x)) + self.offset + self.shortcut(x)
        y = self.twice(self.twice(y)) * torch.tensor(2.0)
        left, right = y.chunk(2, 1)
        y = F.adaptive_avg_pool2d(torch.cat([right, left], 1), 1).view(y.shape[0], -1)
        return self.head(self.drop(y)) * self.scale - self.frozen


class Tied(nn.Module):
    """Two linear layers with one weight, and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.c = nn.Linear(4, 4)
        self.d = self.c

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x)))) + F.linear(x, self.a.weight)


def through(model: nn.Module, example: Tensor) -> Any:
    graph = trace(model, example)
    tensors = {name: value.detach().clone() for name, value in graph.state_dict().items()}
    return from_json(json.loads(json.dumps(to_json(graph))), tensors)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "everything": (Everything, (2, 3, 8, 8)),
    "tied": (Tied, (2, 4)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.GroupNorm(2, 4), nn.SiLU()), (2, 3, 4, 4)),
    "pooled": (lambda: nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Flatten(), nn.Softmax(1)), (2, 3, 8, 8)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8)),
    "resized": (
        lambda: nn.Sequential(nn.Upsample(scale_factor=2.0, mode="bilinear"), nn.PixelUnshuffle(2)),
        (2, 3, 4, 4),
    ),
    "normed": (lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.PReLU(), nn.Hardswish()), (2, 8)),
    "named as a brick": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Threshold(0.1, 2.0)), (2, 8)),
}


@pytest.mark.parametrize(("make", "shape"), CASES.values(), ids=CASES.keys())
def test_a_rebuilt_graph_computes_the_same(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    example = torch.randn(shape)
    rebuilt = through(model, example)
    other = torch.randn(5, *shape[1:])
    assert torch.equal(rebuilt(other), model(other)) or torch.allclose(rebuilt(other), model(other), atol=1e-6)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in rebuilt.named_parameters()}
    again = through(rebuilt, example)  # it can be traced again
    assert torch.equal(again(other), rebuilt(other))


def test_a_rebuilt_graph_trains() -> None:
    torch.manual_seed(0)
    model = through(Everything(), torch.randn(2, 3, 8, 8)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
    optimizer.step()
    after = model.state_dict()
    for name in ("stem.0.weight", "head.bias", "scale", "stem.1.running_mean"):
        assert not torch.equal(before[name], after[name]), name
    assert torch.equal(before["frozen"], after["frozen"])
    assert not model.frozen.requires_grad


def test_tied_parameters_stay_tied() -> None:
    model = through(Tied(), torch.randn(2, 4))
    assert model.a.weight is model.b.weight
    assert len(list(model.parameters())) == len(list(Tied().parameters()))


def test_the_json_is_small_and_plain() -> None:
    graph = to_json(trace(Everything(), torch.randn(2, 3, 8, 8)))
    assert json.loads(json.dumps(graph)) == graph


class Strange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).abs()


def test_an_operator_that_a_file_cannot_hold_is_named() -> None:
    with pytest.raises(ExportError, match=r"aten\.fft_fft"):
        to_json(trace(Strange(), torch.randn(2, 4)))


def test_a_layer_that_a_file_cannot_hold_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(layer_table._NAMES, nn.Tanhshrink)  # the table holds all that torch has today
    with pytest.raises(ExportError, match=r"layer 0 is a .*\.Tanhshrink"):
        to_json(trace(nn.Sequential(nn.Tanhshrink()), torch.randn(2, 4)))


def test_a_parametrized_layer_is_named() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ExportError, match=r"layer 0 \(Linear\) still has a parametrization.*settle"):
        to_json(trace(model, torch.randn(2, 4)))


def small() -> tuple[dict[str, Any], dict[str, Tensor]]:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    graph = trace(model, torch.randn(2, 4))
    return to_json(graph), {name: value.detach().clone() for name, value in graph.state_dict().items()}


def node(target: str, *args: Any, op: str = "call_function") -> Callable[[dict[str, Any]], None]:
    """Puts a node in place of the last before the output."""

    def change(data: dict[str, Any]) -> None:
        data["nodes"][-2] = [op, target, list(args)]

    return change


def layer(kind: Any, **config: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["layers"][1][1:] = [kind, config]

    return change


def field(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data[name] = value

    return change


def path(name: Any) -> Callable[[dict[str, Any]], None]:
    """Another name for the second layer, where it is made and where it is called."""

    def change(data: dict[str, Any]) -> None:
        data["layers"][1][0] = name
        data["nodes"][-2][1] = name

    return change


def placeholder(name: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["nodes"][0][1] = name

    return change


X = {"node": 0}
HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    "operator that reads files": node("aten.from_file.default", "/etc/passwd"),
    "operator of another library": node("prims.abs.default", X),
    "operator that seeds": node("aten.manual_seed.default", 1),
    "memory trick": node("aten.as_strided.default", X, [10**9], [1]),
    "python's eval": node("builtins.eval", "1"),
    "operator with a path": node("aten.add.Tensor.__class__", X, X),
    "long text by multiplication": node("operator.mul", "a", 10**9),
    "multiplication without a node": node("operator.mul", 10, 10),
    "method call": node("relu", X, op="call_method"),
    "layer that is not there": node("2", X, op="call_module"),
    "attribute that is not there": node("0.weight", op="get_attr"),
    "node from the future": node("aten.relu.default", {"node": 7}),
    "node of a negative place": node("aten.relu.default", {"node": -1}),
    "node of truth": node("aten.relu.default", {"node": True}),
    "another device": node("aten.to.device", X, {"device": "cuda"}),
    "unknown dtype": node("aten.to.dtype", X, {"dtype": "qint8"}),
    "argument of two kinds": node("aten.relu.default", {"node": 0, "dtype": "int8"}),
    "argument nested deeply": node("aten.relu.default", [[[[[[[[[[1]]]]]]]]]]),
    "huge number": node("aten.add.Scalar", X, 10**400),
    "two outputs": node("output", X, op="output"),
    "class of the caller's choice": layer("os.system", command="true"),
    "class of torch.nn that is not listed": layer("LazyLinear", out_features=3),
    "container": layer("Module"),
    "type that is a list": layer([]),
    "unknown setting": layer("ReLU", inplace=True, device="cpu"),
    "settings of a wrong kind": layer("Linear", in_features="4", out_features=3, bias=True),
    "settings nested": layer("Conv2d", in_channels=[[1]], out_channels=1, kernel_size=1),
    "settings missing": layer("Conv2d", in_channels=1),
    "huge layer": layer("Linear", in_features=2**30, out_features=2**30, bias=False),
    "brick on another device": layer("Quantizer", bits=8, device="cpu"),
    "brick with wrong settings": layer("PadShortcut", nothing=1),
    "brick with absurd bits": layer("Quantizer", bits=2**30),
    "same as nothing": layer("same", **{"as": "7"}),
    "path with a quote": path('1"); import os; ("'),
    "path of the forward": path("forward"),
    "path of parameters": path("a._parameters"),
    "path of a class": path("__class__"),
    "path inside of a layer": path("0.weight"),
    "path twice": path("0"),
    "path that is a number": path(3),
    "empty path": path(""),
    "input with code": placeholder("x=print(1)"),
    "input with a star": placeholder("*x"),
    "input that is a keyword": placeholder("lambda"),
    "input that is self": placeholder("self"),
    "no nodes": field("nodes", []),
    "nodes are text": field("nodes", "abc"),
    "node of text": field("nodes", ["output"]),
    "no output": field("nodes", [["placeholder", "x", []]]),
    "unknown field": field("code", "print(1)"),
    "attribute without a tensor": field("attributes", [["w", "parameter"]]),
    "attribute of another kind": field("attributes", [["0.weight", "buffer"]]),
    "attribute of no kind": field("attributes", [["0.weight", "pickle"]]),
    "attribute inside of nothing": field("attributes", [["0.bias.x", "buffer"]]),
    "tied to nothing": field("tied", [["0.weight", "w"]]),
    "tied to another shape": field("tied", [["0.weight", "0.bias"]]),
    "tied to a number": field("tied", [[1, 2]]),
    "frozen nothing": field("frozen", ["w"]),
    "frozen list": field("frozen", [[]]),
    "missing layers": field("layers", []),
}  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_graph_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    data, tensors = small()
    assert from_json(copy.deepcopy(data), dict(tensors)) is not None
    change(data)
    with pytest.raises(ValueError, match=r"\w"):
        from_json(data, tensors)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"0.weight": torch.zeros(3, 4)},
        {"0.weight": torch.zeros(4, 3), "0.bias": torch.zeros(3)},
        {"0.weight": torch.zeros(3, 4, dtype=torch.int8), "0.bias": torch.zeros(3)},
        {"0.weight": torch.zeros(3, 4), "0.bias": torch.zeros(3), "x": torch.zeros(1)},
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"missing|needs"):
        from_json(small()[0], tensors)
