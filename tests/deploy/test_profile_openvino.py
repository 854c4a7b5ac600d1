"""OpenVINO's counters, made up and real: each time finds the row that it belongs to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.profile_onnx import Numbered, numbered
from tersenet.deploy.profile_openvino import WARM, WINDOW, OpenvinoProfiler, after_warming, brought_back

CONV, RELU, ADD = ("conv", "Conv2d"), ("", "relu"), ("", "add")


def source() -> Numbered:
    kinds = ("DequantizeLinear", "Conv", "Relu", "Add", "Reshape")
    graph = SimpleNamespace(node=[SimpleNamespace(op_type=kind) for kind in kinds])
    return Numbered(Path("none.onnx"), graph, [CONV, CONV, RELU, ADD, None])


@pytest.mark.parametrize(
    ("origin", "key"),
    [
        ("operator1_", CONV),
        ("operator1_/WithoutBiases,operator2_", CONV),
        ("operator2_,operator3_,operator1_/WithoutBiases", CONV),  # the product has it, wherever it stands
        ("operator3_,operator2_", ADD),
        ("operator2_0", RELU),  # OpenVINO names the last operator after the output
        ("operator4_,operator2_", RELU),
        ("operator4_", ("", "Made")),
        ("", ("", "Made")),
        ("Constant_17", ("", "Made")),
    ],
)
def test_where_a_time_goes(origin: str, key: tuple[str, str]) -> None:
    found = brought_back(source(), {"executed": [0.1, 9.0, 0.2]}, {"executed": "Made"}, {"executed": origin})
    assert found == {key: [0.2]}


def test_nothing_is_dropped() -> None:
    samples = {"a": [0.5], "b": [0.25], "reorder_operator1_": [0.125]}
    found = brought_back(
        source(), samples, dict.fromkeys(samples, "Reorder"), {"a": "operator1_", "b": "operator1_,operator3_"}
    )
    assert found == {CONV: [0.5, 0.25], ("", "Reorder"): [0.125]}


def test_the_first_calls_are_taken_out_of_the_mean() -> None:
    calls = [3.0, 0.5, 0.5, 0.5, *[0.02] * (WINDOW - WARM)]
    mean, warm = sum(calls) / WINDOW, sum(calls[:WARM]) / WARM
    assert after_warming(mean, WINDOW, warm) == pytest.approx(0.02)
    assert after_warming(0.0, WINDOW, 0.001) == 0.0  # rounding down never makes a time negative


@pytest.mark.parametrize("calls", [WARM + 1, 2 * WINDOW + 3])
def test_real_counters(calls: int, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 7), nn.Flatten(), nn.Linear(4096, 4)).eval()
    path = export_onnx(model, torch.randn(1, 3, 16, 16), tmp_path / "model.onnx")
    twin = numbered(path, tmp_path, lambda graph: [(node.op_type, node.name) for node in graph.node])
    profiler = OpenvinoProfiler(twin, threads=1)
    for _ in range(calls):
        profiler((torch.randn(1, 3, 16, 16).numpy(),))
    found = profiler.times()
    products = [row for row in found if row[0] in ("Conv", "Gemm")]
    assert len(products) == 3
    heavy = max(found, key=lambda row: sum(found[row]))
    assert heavy == [row for row in products if row[0] == "Conv"][1]
    assert all(value >= 0 for values in found.values() for value in values)
