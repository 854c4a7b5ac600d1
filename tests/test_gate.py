"""The gate of `tersenet check`, on a report whose figures are made up, and on files that are measured."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tersenet.errors import FileError, RunError, SettingsError
from tersenet.gate import gate, gate_text

NET = b"not opened, because only its size is asked for"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that lost 1.5 points, became 4 times faster in one runtime and not in the other, and 10 times smaller."""
    rows = [
        {
            "step": "original",
            "score": 0.92,
            "file_bytes": {"onnx": 1000, "terse": 800},
            "latency_ms": {"onnxruntime": {"median": 2.0}, "openvino": {"median": 1.0}},
        },
        {
            "step": "1. quantize",
            "score": 0.905,
            "scores": {"pytorch": 0.91, "onnxruntime": 0.905},
            "file_bytes": {"onnx": 250, "terse": 100},
            "latency_ms": {"onnxruntime": {"median": 0.5}, "openvino": {"median": 1.0}},
        },
    ]
    (tmp_path / "model.onnx").write_bytes(NET)
    (tmp_path / "model.terse").write_bytes(NET)
    entry = {"bytes": len(NET), "sha256": hashlib.sha256(NET).hexdigest()}
    files = {"model.onnx": {**entry, "score": 0.905}, "model.terse": entry}
    (tmp_path / "report.json").write_text(json.dumps({"rows": rows, "files": files}))
    return tmp_path


@pytest.mark.parametrize(
    ("limits", "met", "wanted", "got"),
    [
        ({"max_drop": 1.5}, True, 1.5, 1.5),
        ({"max_drop": 1.49}, False, 1.49, 1.5),
        ({"max_latency": "0.5ms"}, True, 0.5, 0.5),
        ({"max_latency": "0.4"}, False, 0.4, 0.5),
        ({"max_latency": "0.25x"}, True, 0.5, 0.5),
        ({"max_latency": "0.5x", "runtime": "openvino"}, False, 0.5, 1.0),
        ({"max_bytes": "100"}, True, 100, 100),
        ({"max_bytes": "0.09x"}, False, 90, 100),  # of the original's .onnx
    ],
)
def test_a_run_is_held_to_its_report(run: Path, limits: dict, met: bool, wanted: float, got: float) -> None:
    found = gate(run, **limits)
    assert found["met"] is met
    (target,) = found["targets"]
    assert target["wanted"] == pytest.approx(wanted)
    assert target["got"] == pytest.approx(got)
    assert target["met"] is met


def test_one_miss_is_enough(run: Path) -> None:
    found = gate(run, max_drop=2.0, max_latency="1ms", max_bytes="50")
    assert [each["met"] for each in found["targets"]] == [True, True, False]
    assert not found["met"]
    assert gate_text(found).splitlines() == [
        "met     points of score lost: 1.5 (at most 2)",
        "met     ms in onnxruntime: 0.5 (at most 1)",
        "MISSED  bytes of model.terse: 100 (at most 50)",
    ]


def test_a_file_of_a_run_knows_its_score_and_its_original(run: Path) -> None:
    found = gate(run / "model.onnx", max_drop=1.0, max_bytes="0.05x")
    assert [(each["what"], each["got"], each["met"]) for each in found["targets"]] == [
        ("points of score lost", 1.5, False),
        ("bytes of model.onnx", len(NET), True),
    ]
    # A .terse file scores as PyTorch does.
    assert gate(run / "model.terse", max_drop=1.0)["targets"][0]["got"] == 1.0


def test_a_file_that_was_changed_has_no_known_score(run: Path) -> None:
    (run / "model.onnx").write_bytes(NET + b"!")
    with pytest.raises(SettingsError, match="its score is not known"):
        gate(run / "model.onnx", max_drop=1.0)


def test_a_file_alone_has_no_original(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "elsewhere" / "model.onnx"
    alone.parent.mkdir()
    alone.write_bytes(NET)
    assert gate(alone, max_bytes="46")["met"]
    assert not gate(alone, max_bytes="45")["met"]
    for limits in ({"max_bytes": "0.5x"}, {"max_latency": "0.5x"}):
        with pytest.raises(SettingsError, match="the original is not known here"):
            gate(alone, **limits)


@pytest.mark.parametrize("text", ["fast", "0", "-1ms", "nan", "inf", "x", "3sec", ""])
def test_limits_that_cannot_be_read(run: Path, text: str) -> None:
    with pytest.raises(SettingsError, match=r"--max-latency is .*; give a limit such as 3ms, or 0\.5x"):
        gate(run, max_latency=text)


def test_what_cannot_be_checked(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nothing to check"):
        gate(run)
    with pytest.raises(SettingsError, match="no latency in 'pytorch'; it has one in onnxruntime, openvino"):
        gate(run, max_latency="1ms", runtime="pytorch")
    with pytest.raises(FileError, match="there is no file"):
        gate(run / "none.onnx", max_drop=1.0)
    with pytest.raises(RunError, match="there is no folder"):
        gate(run / "none", max_drop=1.0)
    report = json.loads((run / "report.json").read_text())
    report["rows"][1]["score"] = None
    (run / "report.json").write_text(json.dumps(report))
    with pytest.raises(SettingsError, match="has no score"):
        gate(run, max_drop=1.0)


def test_a_file_is_held_to_being_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(NET)
    left = ["Gelu node_7"]
    monkeypatch.setattr("tersenet.gate.left_in_float", lambda path, runtime: left)
    monkeypatch.setattr("tersenet.gate.integer_operators", lambda path, runtime: 0)
    found = gate(path, fused=True, runtime="openvino")
    assert found["met"] is False
    assert found["targets"][0]["operators"] == left
    assert gate_text(found).splitlines()[1].strip() == "Gelu node_7"
    left.clear()
    with pytest.raises(SettingsError, match="runs in float in onnxruntime"):
        gate(path, fused=True)
    monkeypatch.setattr("tersenet.gate.integer_operators", lambda path, runtime: 5)
    assert gate(path, fused=True)["met"] is True
    twin = tmp_path / "net.tensorrt.onnx"
    twin.write_bytes(NET)
    monkeypatch.setattr("tersenet.gate.broken_rules", lambda path: ["opset 25 is not one of 13 to 20"])
    assert gate(twin, fused=True)["targets"][0]["what"] == "rules of TensorRT broken"


def test_a_run_is_held_to_being_fused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("tersenet.gate.left_in_float", lambda path, runtime: seen.append((path.name, runtime)) or ["x"])
    assert gate(run, fused=True)["met"] is False
    assert gate(run, fused=True, runtime="openvino")["met"] is False
    assert seen == [("model.onnx", "onnxruntime"), ("model.onnx", "openvino")]
    with pytest.raises(SettingsError, match="no file for 'litert'"):
        gate(run, fused=True, runtime="litert")
