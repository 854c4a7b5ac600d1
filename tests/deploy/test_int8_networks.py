"""The networks of benchmarks/int8_both_runtimes.py, trained for less long: int8 files score as was simulated."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "int8_both_runtimes.py"))


@pytest.mark.minutes
@pytest.mark.parametrize("name", BENCHMARK["NETWORKS"])
def test_int8_scores_as_simulated_in_both_runtimes(name: str, tmp_path: Path) -> None:
    for package in ("sklearn", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    measured = BENCHMARK["measure"](name, tmp_path, epochs=15)
    assert measured["scores"]["simulated"] > 60  # it has learned something that can be lost
    assert BENCHMARK["within"](measured["scores"]), measured
    assert max(measured["largest_error"].values()) < 0.1, measured
