"""The table in the terminal fits 100 columns and shows gains both ways."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tersenet.report.terminal import table


@pytest.fixture
def example():
    return json.loads((Path(__file__).parent / "example_report.json").read_text(encoding="utf-8"))


def shown(report, width=100):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table(report))
    return console.file.getvalue()


def test_it_reads_at_100_columns(example):
    text = shown(example)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text  # nothing was cut
    original, quantized = example["rows"][0], example["rows"][-1]
    before, after = original["file_bytes"]["onnx"], quantized["file_bytes"]["terse"]
    fast, slow = quantized["latency_ms"]["onnxruntime"]["median"], original["latency_ms"]["onnxruntime"]["median"]
    for wanted in ("91.73 %", "91.50 %", "90.9-92.0", "0.23", "10,000 samples", "threads 1, batch 1"):
        assert wanted in text
    assert f"{before / after:.1f}x; {after / before:.2f}" in text
    assert f"{slow / fast:.1f}x; {fast / slow:.2f}" in text


def test_what_was_not_measured_is_a_dash():
    report = {"settings": {}, "rows": [{"step": "original", "macs": 10}, {"step": "a_step_with_a_very_long_name"}]}
    text = shown(report, 60)
    assert "-" in text
    assert "nan" not in text.lower()
    assert "None" not in text
