"""The figures of docs/onnx.md, from the results of onnx_import.py and ocr.py.

python benchmarks/onnx_page.py            rewrites the part between the marks
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "onnx.md"
MARKS = re.compile(r"(<!-- from onnx_import, ocr -->\n).*?(<!-- end -->)", re.DOTALL)
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
JOBS = {
    "dynamo": "torch's current exporter, open batch: float",
    "torchscript": "torch's older exporter, batch of one: float",
    "int8": "compressed to int8, in both runtimes",
    "half": "half of the channels pruned, in both runtimes",
}
Row = dict[str, Any]


def filled(text: str) -> str:
    """The page with its figures written anew."""
    logs = {name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in ("onnx_import", "ocr")}
    figures = imports(logs["onnx_import"]["rows"]) + recognized(logs["ocr"]) + detected(logs["ocr"])
    return MARKS.sub(lambda match: match[1] + "\n".join(figures) + "\n" + match[2], text)


def imports(rows: dict[str, Row]) -> list[str]:
    """A row per job, and a line for each network whose job is not right."""
    networks = {name: row for name, row in rows.items() if not name.startswith("ocr:")}
    own, others = (sum((":" not in name) == ours for name in networks) for ours in (True, False))
    lines = [
        f"{own} networks of `tersenet.models` and {others} of timm and torchvision (EfficientNet-Lite0 among them):",
        "", "| file | run | right | largest difference | not right |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for job, words in JOBS.items():
        done = {name: row[job] for name, row in networks.items() if job in row}
        right = [row for row in done.values() if row["verdict"] == "right"]
        worst = f"{max(row['differs'] for row in right):.1e}" if job in ("dynamo", "torchscript") else ""
        rest = ", ".join(f"{name.partition(':')[2] or name} ({row['verdict']})" for name, row in done.items()
                         if row["verdict"] != "right")  # fmt: skip
        lines.append(f"| {words} | {len(done)} | {len(right)} | {worst} | {rest} |")
    ocr = [f"{row['dynamo']['differs']:.1e}" for name, row in rows.items() if name.startswith("ocr:")]
    sizes = "PP-OCRv6 detection at 640x640, recognition at 48x320, orientation at 48x192"
    return [*lines, "", f"{sizes}: {', '.join(ocr)}.", ""]


def recognized(log: Row) -> list[str]:
    """Recognition in int8 against float."""
    row = log["recognition"]
    lines = [
        f"PP-OCRv6 recognition on {row['words']} rendered words ({_sizes(row)}):",
        "", "| | same text as float | characters as float | right text | right characters |", "|---|---|---|---|---|",
        f"| float | | | {row['float']['right']} | {_percent(row['float']['characters_right'])} |",
    ]  # fmt: skip
    for name, words in RUNTIMES.items():
        each = row[name]
        lines.append(
            f"| int8 in {words} | {each['same_as_float']} | {_percent(each['characters_same'])} | {each['right']} "
            f"| {_percent(each['characters_right'])} |"
        )
    return [*lines, "", _head(row), ""]


def detected(log: Row) -> list[str]:
    """Detection in int8 against float."""
    row = log["detection"]
    lines = [
        f"PP-OCRv6 detection on {row['pages']} rendered pages with {row['lines']} lines ({_sizes(row)}):",
        "", "| | intersection over union of maps at 0.3 | pixels alike | boxes | boxes as float (F1) | lines found |",
        "|---|---|---|---|---|---|",
        f"| float | | | {row['float']['boxes']} | | {row['float']['lines_found']} |",
    ]  # fmt: skip
    for name, words in RUNTIMES.items():
        each = row[name]
        lines.append(
            f"| int8 in {words} | {each['pixels_iou']:.3f} | {_percent(each['pixels_same'])} | {each['boxes']} "
            f"| {each['boxes_same_f1']:.3f} | {each['lines_found']} |"
        )
    return [*lines, "", _head(row), ""]


def _head(row: Row) -> str:
    """What int8 costs, with the last quantized layer in int8 and in float, and what stays in float."""
    lost = row["head"]["outputs_lost"]
    floats = [layer for each in row["left_in_float"] for why in each["reasons"] for layer in why["layers"]]
    kept = f"In float stay {', '.join(f'`{layer}`' for layer in floats)}." if floats else "No layer stays in float."
    return (
        f"int8 costs {_percent(lost['int8'])} of the outputs' variance, and {_percent(lost['float'])} with the last "
        f"quantized layer (`{row['head']['layer']}`) in float. {kept}"
    )


def _sizes(row: Row) -> str:
    before, after = (row["bytes"][name] / 1e6 for name in ("float", "int8"))
    return f"{before:.1f} MB in float, {after:.1f} MB in int8"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
