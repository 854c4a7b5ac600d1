"""`tersenet profile` and `tersenet doctor` as they are typed. The roofline is made up, for a real one takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from command import tersenet
from tersenet.deploy import roofline as room
from tersenet.deploy.causes import CAUSES
from tersenet.deploy.roofline import Roofline

pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TERSENET_CACHE", str(tmp_path / "cache"))
    flops = {"float32": {"pytorch": 1e11}, "int8": {"onnxruntime": 4e11}}
    monkeypatch.setattr(room, "measured", lambda threads: Roofline(threads, flops, 1e10, 1e11, 2**25, 16))
    return tmp_path / "cache"


def test_a_file_in_two_runtimes(tiny_onnx: Path, cache: Path) -> None:
    pytest.importorskip("openvino")
    ended = tersenet("profile", tiny_onnx, "--runtime", "onnxruntime,openvino", "--json")
    assert ended.code == 0, ended.err
    assert "measuring what this machine can do" in ended.err
    profiles = ended.json["profiles"]
    assert [found["runtime"] for found in profiles] == ["onnxruntime", "openvino"]
    for found in profiles:
        assert found["roofline"]["peak_gflops"] == {"float32": 100, "int8": 400}
        assert {row["cause"] for row in found["rows"]} <= {*CAUSES, None}
    again = tersenet("profile", tiny_onnx, "--runtime", "onnxruntime,openvino")
    assert again.code == 0
    assert "measuring" not in again.err
    assert "OpenVINO" in again.out.splitlines()[0]


def test_a_damaged_cache_is_said(tiny_onnx: Path, cache: Path) -> None:
    tersenet("profile", tiny_onnx, "--json")
    (kept,) = (cache / "roofline").iterdir()
    kept.write_text("{")
    ended = tersenet("profile", tiny_onnx, "--json")
    assert ended.code == 0
    assert "damaged; it is measured again" in ended.err
    assert ended.json["rows"]


def test_what_is_refused(tiny_onnx: Path) -> None:
    assert "leave --weights and --data out" in tersenet("profile", tiny_onnx, "--data", "digits").sentence
    assert "'litert'" in tersenet("profile", "digits", "--runtime", "litert").sentence
    assert "no file none.onnx" in tersenet("profile", "none.onnx").sentence


def test_the_doctor_measures_anew_unless_it_is_quick(cache: Path) -> None:
    for _ in range(2):
        ended = tersenet("doctor", "--threads", "2", "--json")
        assert "2 threads (seconds)" in ended.err
        assert ended.json["roofline"]["memory_gb_s"] == 10
    assert "Measured roof with 2 threads: 100 in float32 and 400 in int8" in tersenet("doctor", "--threads", "2").out
    quick = tersenet("doctor", "--quick", "--json")
    assert "roofline" not in quick.json
    assert quick.err == ""
