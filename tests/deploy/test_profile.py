"""Profiles: every layer has a row, every time a row, and the heavy layer gets the heavy operator."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.bricks.shortcut import PadShortcut
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.profile import profile_model
from tersenet.deploy.profile_onnx import OnnxProfiler, _origins, numbered, owners, told_apart
from tersenet.deploy.profile_table import ProfileTable
from tersenet.errors import SettingsError
from tersenet.graph.costs import costs
from tersenet.graph.trace import trace
from tersenet.quantization.quantize import Quantize
from tersenet.task import Task

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TASK = Task(example=X[:2], calibrate=[(X, torch.zeros(4))], quiet=True)


class Uneven(nn.Module):
    """A residual net whose middle convolution has far more multiply-adds than all the rest."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.turned = turned
        self.first, self.norm = nn.Conv2d(3, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.heavy, self.down = nn.Conv2d(32, 32, 7, padding=3), nn.Conv2d(32, 32, 1)
        self.shortcut, self.act = PadShortcut(0, 0, 1), nn.ReLU()
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = self.act(self.down(x) + self.heavy(x) if self.turned else self.heavy(x) + self.down(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Sequence(nn.Module):
    """Linear layers on (N, T, C), whose weights lose their names, and two norms that are equal when fresh."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.wide, self.tall, self.after = (
            nn.LayerNorm(8), nn.Linear(8, 64), nn.Linear(64, 8, bias=False), nn.LayerNorm(8),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.tall(F.silu(self.wide(self.before(x)))))


@pytest.fixture(scope="module")
def uneven() -> nn.Module:
    torch.manual_seed(0)
    return Uneven().train()


@pytest.fixture(scope="module", params=["onnxruntime", "openvino", "pytorch"])
def found(request: pytest.FixtureRequest, uneven: nn.Module) -> dict[str, Any]:
    if request.param == "openvino":
        pytest.importorskip("openvino")
    return profile_model(uneven, X[:1], runtime=request.param)


def by_key(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["path"], row["kind"]): row for row in found["rows"]}


def check_whole(found: dict[str, Any], model: nn.Module, x: Tensor) -> None:
    """What holds of every profile."""
    expected = costs(model, x)
    rows = [row for row in found["rows"] if row["layer"]]
    assert [(row["path"], row["kind"]) for row in rows] == [(layer.path, layer.kind) for layer in expected]
    assert [row["macs"] for row in rows] == [layer.macs for layer in expected]
    assert found["totals"]["macs"] == sum(layer.macs for layer in expected)
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1)
    assert sum(row["ms"] or 0 for row in found["rows"]) == pytest.approx(found["totals"]["ms"])
    assert found["latency_ms"]["median"] > 0
    assert all(row["ms"] is None or row["ms"] >= 0 for row in found["rows"])
    assert all(row["calls"] for row in found["rows"] if row["ms"] is not None)
    assert json.loads(json.dumps(found)) == found


def test_rows_and_shares(found: dict[str, Any], uneven: nn.Module) -> None:
    check_whole(found, uneven, X[:1])
    assert uneven.training
    rows = by_key(found)
    heavy = rows["heavy", "Conv2d"]
    assert heavy["macs"] == 32 * 32 * 7 * 7 * 16 * 16 > 5 * sum(r["macs"] for r in rows.values() if r is not heavy)
    assert heavy["intensity"] == pytest.approx(2 * heavy["macs"] / heavy["bytes_moved"])
    for path, kind in (("first", "Conv2d"), ("heavy", "Conv2d"), ("down", "Conv2d"), ("head", "Linear")):
        assert rows[path, kind]["calls"] == 1, path
    assert heavy["ms"] > 0  # the profiler counts whole microseconds, so that a tiny layer may take none


@pytest.mark.parametrize(("turned", "quantized"), [(False, False), (True, False), (False, True)])
def test_who_is_who_in_the_optimised_graph(turned: bool, quantized: bool, tmp_path: Path) -> None:
    """Only one convolution is 7 by 7, in the model and in what ONNX Runtime makes of it; one swallows the addition."""
    torch.manual_seed(0)
    model = Uneven(turned).eval()
    if quantized:
        model, _ = Quantize().run(model, TASK)
    model = told_apart(model)
    graph = trace(model, X)
    keys = {
        node: (str(node.target), type(graph.get_submodule(str(node.target))).__name__)
        for node in graph.graph.nodes
        if node.op == "call_module"
    }
    path = export_onnx(model, X, tmp_path / "model.onnx")
    source = numbered(path, tmp_path, lambda proto: owners(proto, graph, keys))
    profiler = OnnxProfiler(source, tmp_path, threads=1)
    profiler((X.numpy(),))
    assert sum(map(sum, profiler.times().values())) > 0
    executed = onnx.load(profiler.optimised).graph.node
    origins = _origins(source.graph, executed)
    seen = {}
    for node in executed:
        sizes = [list(each.ints) for each in node.attribute if each.name == "kernel_shape"]
        if "Conv" in node.op_type:
            row = source.rows[origins[node.name]]
            assert row is not None
            seen[row[0]] = sizes[0]
    assert seen == {"first": [1, 1], "heavy": [7, 7], "down": [1, 1]}


def test_what_is_folded_takes_no_time() -> None:
    rows = by_key(profile_model(Uneven().eval(), X, runtime="onnxruntime", batch=2))
    assert rows["norm", "BatchNorm2d"]["ms"] is None
    assert rows["", "relu"]["ms"] is None  # fused into `first`
    rows = by_key(profile_model(Uneven().eval(), X, runtime="pytorch", batch=2))
    assert rows["norm", "BatchNorm2d"]["ms"] > 0
    assert rows["", "relu"]["ms"] > 0
    assert not rows["", "flatten"]["layer"]  # a view costs nothing, but PyTorch takes time to make it


def test_a_model_in_training_mode_is_profiled_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(768), nn.Linear(768, 2)).train()
    found = profile_model(model, X[:1], runtime="pytorch")  # one sample has no statistics to train with
    check_whole(found, model, X[:1])
    assert model[1].training
    assert model[1].num_batches_tracked == 0


@pytest.mark.minutes
def test_quantized() -> None:
    torch.manual_seed(0)
    model, _ = Quantize().run(Uneven().eval(), TASK)
    found = profile_model(model, X[:1])
    assert found["runtime"] == "onnxruntime"
    check_whole(found, model, X[:1])
    rows = by_key(found)
    for path in ("first", "heavy", "down"):
        assert rows[path, "QuantizedConv2d"]["calls"] == 1
    assert rows["head", "QuantizedLinear"]["calls"] == 1
    assert rows["", "add"]["calls"] == 1


def test_layers_on_sequences() -> None:
    x = torch.randn(2, 6, 8)
    found = profile_model(Sequence().eval(), x, runtime="onnxruntime", batch=2)
    rows = by_key(found)
    for path, kind in (("before", "LayerNorm"), ("tall", "Linear"), ("after", "LayerNorm")):
        assert rows[path, kind]["calls"] == 1, path
    assert rows["wide", "Linear"]["calls"] in (1, 2)  # the product, and the bias where it is not fused
    assert "MatMul" not in {row["kind"] for row in found["rows"]}


def test_equal_parameters_are_told_apart() -> None:
    model = nn.ModuleList([nn.LayerNorm(2), nn.LayerNorm(2)])
    with torch.no_grad():
        for module in model:
            module.bias.fill_(float("inf"))  # nothing added to it makes it another
    values = [tuple(parameter.tolist()) for parameter in told_apart(model).parameters()]
    assert len(set(values)) == 4
    assert torch.equal(model[0].weight, model[1].weight)


def test_table_fits_the_terminal(found: dict[str, Any]) -> None:
    console = Console(width=100, record=True, force_terminal=False, file=io.StringIO())
    console.print(ProfileTable(found))
    text = console.export_text()
    assert all(len(line) <= 100 for line in text.splitlines())
    lines = [line for line in text.splitlines() if line.strip().startswith("heavy")]
    assert len(lines) == 1
    assert "12.8 M" in lines[0]
    assert "latency of the model" in text
    assert "100 %" in text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"runtime": "litert"}, "'litert'; allowed: onnxruntime, openvino, pytorch"),
        ({"threads": 0}, "at least 1, got 0 and 1"),
        ({"batch": 0}, "at least 1, got 1 and 0"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        profile_model(nn.Flatten(), X, **settings)
