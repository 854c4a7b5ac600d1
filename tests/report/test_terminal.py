"""The table in the terminal fits 80 columns and shows gains both ways."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tersenet.report.terminal import notes, table


@pytest.fixture
def example():
    return json.loads((Path(__file__).parent / "example_report.json").read_text(encoding="utf-8"))


def shown(report, width=80):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table(report))
    return console.file.getvalue()


def test_it_reads_at_80_columns(example):
    example["rows"][-1]["step"] = "4. fold_batch_norm"
    text = shown(example)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text  # nothing was cut
    assert "4. fold_batch_norm" in text  # nor broken into two lines
    original, quantized = example["rows"][0], example["rows"][-1]
    fast, slow = quantized["latency_ms"]["onnxruntime"]["median"], original["latency_ms"]["onnxruntime"]["median"]
    for wanted in ("91.73 %", "91.50 %", "90.9-92.0", "0.23 lost", "10,000 samples", "threads 1, batch 1"):
        assert wanted in " ".join(text.split())
    for kind in ("onnx", "terse"):  # each against the original's of the same format
        before, after = original["file_bytes"][kind], quantized["file_bytes"][kind]
        assert f"{before / after:.1f}x; {after / before:.2f}" in text
    assert f"{slow / fast:.1f}x; {fast / slow:.2f}" in text


def test_what_was_not_measured_is_a_dash():
    report = {"settings": {}, "rows": [{"step": "original", "macs": 10}, {"step": "a_step_with_a_very_long_name"}]}
    text = shown(report, 60)
    assert "-" in text
    assert "nan" not in text.lower()
    assert "None" not in text


def test_a_metric_is_called_by_its_name_and_unit(example):
    example["metric"] = {"name": "MAE", "unit": "px", "higher_is_better": False}
    text = shown(example, 100)
    assert "MAE, lower is better" in text
    assert "0.9173 px" in text
    assert "0.0023 gained" in text  # less error
    assert "%" not in text.replace("95 % interval", "")


def test_warnings_of_the_report_are_said_too(example):
    assert f"mind: {example['warnings'][0]}" in notes(example)
