"""Writes the README's tables and sentences from the committed reports, so that no figure in it is typed by hand.

python docs/tables.py            rewrites README.md
python docs/tables.py --check    exits with 1 when README.md says something else than the reports
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from tersenet.numerics.scale import Scale
from tersenet.report.headline import first_runtime, verdict
from tersenet.report.words import bytes_text, count_text, milliseconds_text, runtime_name

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- from ([a-z0-9_]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def table(report: dict[str, Any]) -> str:
    """A row per step: score, points lost, multiply-adds, bytes of the .terse and .onnx files, latency."""
    runtime = first_runtime(report)
    rows, first, scale = report["rows"], report["rows"][0], Scale.of(report)
    assert runtime is not None
    lines = [
        f"| step | score | points lost | MACs | .terse | .onnx | {runtime_name(runtime)}, one call |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        latency, sizes = row["latency_ms"][runtime], row["file_bytes"]
        speed = (
            f" ({1 / (latency['median'] / first['latency_ms'][runtime]['median']):.2f}x)" if row is not first else ""
        )
        lines.append(
            f"| {row['step']} | {scale.text(row['score'])} "
            f"| {scale.loss_number(scale.lost(first['score'], row['score']))} "
            f"| {count_text(row['macs'])} | {bytes_text(sizes['terse'])} | {bytes_text(sizes['onnx'])} "
            f"| {milliseconds_text(latency['median'])}{speed} |"
        )
    return "\n".join(lines) + f"\n\n> {verdict(report)}.\n\nOn {report['machine']['cpu']}, one core, batch 1.\n"


def written(text: str) -> str:
    """The README with every block filled anew."""

    def fill(match: re.Match[str]) -> str:
        report = json.loads((RESULTS / f"{match[2]}.json").read_text(encoding="utf-8"))
        return f"{match[1]}\n{table(report)}\n{match[4]}"

    return BLOCK.sub(fill, text)


def main() -> None:
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = written(before)
    if "--check" in sys.argv:
        sys.exit(0 if before == after else "README.md does not say what the reports say; run python docs/tables.py")
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
