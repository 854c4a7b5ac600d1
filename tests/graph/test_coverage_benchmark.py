"""The benchmark of covered networks runs, on the smallest of its list."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tersenet.graph import capture


def test_one_network_is_captured_cut_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.setattr(sys, "path", [str(benchmarks), *sys.path])
    monkeypatch.setattr(capture, "_attempt", capture._attempt)  # the benchmark times it from inside
    # Under a name of its own: a package for the coverage of tests may be installed.
    spec = importlib.util.spec_from_file_location("coverage_of_networks", benchmarks / "coverage.py")
    assert spec is not None
    assert spec.loader is not None
    coverage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(coverage)
    row = coverage.one("yolo")
    assert coverage.passed(row), row
    assert row["left"] < row["parameters"] / 2
    assert row["export_seconds"] > 0
