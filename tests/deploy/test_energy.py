from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tersenet.deploy.energy import Counters, estimate
from tersenet.deploy.estimate import estimate_file
from tersenet.deploy.pt2 import export_pt2


def package(root: Path, name: str, microjoules: int) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("1000000\n")
    return folder


def test_packages_are_summed_and_their_parts_left_out(tmp_path: Path) -> None:
    first, second = package(tmp_path, "intel-rapl:0", 100), package(tmp_path, "intel-rapl:1", 7)
    package(tmp_path, "intel-rapl:0:0", 5)  # a part of the first
    package(tmp_path, "dtpm", 5)
    counters = Counters.find(tmp_path)
    assert counters is not None
    before = counters.read()
    assert before == (100, 7)
    (first / "energy_uj").write_text("2100")
    (second / "energy_uj").write_text("1007")
    assert counters.joules(before, counters.read()) == pytest.approx(3000e-6)


def test_a_counter_that_started_again_is_followed(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", 0)
    counters = Counters.find(tmp_path)
    assert counters is not None
    assert counters.joules((999_000,), (500,)) == pytest.approx(1500e-6)


def test_there_are_none_where_they_cannot_be_read(tmp_path: Path) -> None:
    assert Counters.find(tmp_path / "none") is None
    assert Counters.find(tmp_path) is None
    (package(tmp_path, "intel-rapl:0", 1) / "energy_uj").unlink()
    assert Counters.find(tmp_path) is None


def test_an_estimate_says_that_it_is_one() -> None:
    found = estimate(1_000_000, 1000)
    assert found.joules == pytest.approx(1e6 * 4.6e-12 + 1e3 * 160e-12)
    assert (found.source, found.low, found.high) == ("estimate", None, None)
    assert "not measured" in found.note
    assert estimate(1_000_000, 0, 8).joules == pytest.approx(0.23e-6)


def test_files_are_counted_as_the_model_is(tiny_model: nn.Module, tiny_onnx: Path, tmp_path: Path) -> None:
    macs = 4 * 3 * 9 * 64 + 16 * 6
    onnx = estimate_file(tiny_onnx, [np.zeros((2, 3, 8, 8), np.float32)])
    assert onnx is not None
    assert f"from {2 * macs:,} 32-bit" in onnx.note
    program = export_pt2(tiny_model, torch.zeros(1, 3, 8, 8), tmp_path / "a.pt2")
    one, two = (estimate_file(program, [np.zeros((n, 3, 8, 8), np.float32)]) for n in (1, 2))
    assert one is not None
    assert two is not None
    assert f"from {macs:,} 32-bit" in one.note
    assert one.joules < two.joules < 2 * one.joules  # the weights are read once
    assert estimate_file(tmp_path / "a.tflite", [np.zeros((1, 3))]) is None
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    assert estimate_file(tmp_path / "junk.onnx", [np.zeros((1, 3))]) is None
