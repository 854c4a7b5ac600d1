"""The figures of zoo/README.md are those of the reports and files beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ZOO = Path(__file__).parents[1] / "zoo"
ROWS = re.findall(r"^\| \[([a-z0-9.-]+)\]\(\1\) \|[^|]*\| ([0-9.]+) % \|[^|]*\| ([0-9,]+) \| ([0-9,]*) ?\|$",
                  (ZOO / "README.md").read_text(encoding="utf-8"), re.MULTILINE)  # fmt: skip


def test_every_folder_has_its_row() -> None:
    assert [name for name, *_ in ROWS] == sorted(path.name for path in ZOO.iterdir() if path.is_dir())


@pytest.mark.parametrize(("name", "score", "terse", "onnx"), ROWS, ids=[name for name, *_ in ROWS])
def test_a_row_says_what_the_files_say(name: str, score: str, terse: str, onnx: str) -> None:
    folder = ZOO / name
    assert int(terse.replace(",", "")) == (folder / "model.terse").stat().st_size
    assert bool(onnx) == (folder / "model.onnx").exists()
    if onnx:
        assert int(onnx.replace(",", "")) == (folder / "model.onnx").stat().st_size
    if (folder / "report.json").exists():
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        assert score == f"{100 * report['rows'][-1]['score']:.2f}"
        assert report["files"]["model.terse"]["bytes"] == (folder / "model.terse").stat().st_size
