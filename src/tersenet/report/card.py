"""The README.md of a run folder: a model card after M. Mitchell et al., "Model Cards for Model Reporting", 2019.

It says what the model is, how it scores, how each file is loaded in its own runtime, how an input is prepared, and what
was not tested. The text is card.md; what comes from a report cannot break out of its line, table cell or code span.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tersenet.atomic import writing
from tersenet.left_alone import share_text, some
from tersenet.report.headline import first_runtime, headline_bytes, original_bytes
from tersenet.report.report import validate
from tersenet.report.words import (
    bytes_text,
    milliseconds_span,
    milliseconds_text,
    percent,
    percent_span,
    plain,
    runtime_name,
)

# More labels than these would bury the rest of the card.
SHOWN_LABELS = 40

# Of its own accord OpenVINO computes in bfloat16 where the processor can, and rounds what some linear layers read.
_EXACT = '{{"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}}'
_OPENVINO = (
    "OpenVINO",
    "import numpy, openvino",
    f'openvino.compile_model({{name}}, "CPU", {_EXACT})',
    "model(images)[0]",
)
SNIPPETS = {
    ".onnx": (
        (
            "ONNX Runtime",
            "import numpy, onnxruntime",
            "onnxruntime.InferenceSession({name})",
            "model.run(None, {{model.get_inputs()[0].name: images}})[0]",
        ),
        _OPENVINO,
    ),
    ".xml": (_OPENVINO,),
    ".pt2": (
        ("Plain PyTorch, without tersenet", "import torch", "torch.export.load({name}).module()", "model(images)"),
    ),
    ".terse": (("tersenet", "import torch, tersenet", "tersenet.load({name}).eval()", "model(images)"),),
}

# How all inputs are given by order, where that is not as in PyTorch.
_ON_ALL = {
    "ONNX Runtime": "model.run(None, {each.name: x for each, x in zip(model.get_inputs(), inputs)})",
    "OpenVINO": "model(inputs)",
}


def write_card(report: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes the model card. Raises FileError when the report does not fit the schema."""
    validate(report)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"line": line, "cell": cell, "code": code}
    text = environment.get_template("card.md").render(facts(report))
    with writing(path) as temporary:
        temporary.write_text(re.sub(r"\n{3,}", "\n\n", text), encoding="utf-8")


def line(value: Any) -> str:
    """Text on one line, in which nothing is read as HTML or as Markdown."""
    text = re.sub(r"\s+", " ", str(value)).strip()
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)


def cell(value: Any) -> str:
    """Text for a cell of a table."""
    return line(value) or "-"


def code(value: Any) -> str:
    """Text between two backticks."""
    return re.sub(r"\s+", " ", str(value)).replace("`", "'")


def facts(report: dict[str, Any]) -> dict[str, Any]:
    """Everything that card.md names."""
    settings, preparation, runtime = report["settings"], report.get("preparation", {}), first_runtime(report)
    known = all(key in preparation for key in ("size", "mean", "std"))
    shape = [len(preparation["mean"]), *preparation["size"]] if known else None
    first, last = report["rows"][0], report["rows"][-1]
    rows = [("original", first, original_bytes(report))]
    if last is not first:
        rows.append(("this model", last, headline_bytes(last)))
    labels = preparation.get("labels", [])
    measured = last.get("latency_ms", {}).get(runtime)
    shared = [f"{key} {measured[key]}" for key in ("threads", "batch") if key in measured] if measured else []
    return {
        "name": settings.get("model") or "A compressed model",
        "data": settings.get("data"),
        "verdict": report["verdict"],
        "rows": [row_facts(name, row, size, runtime) for name, row, size in rows],
        "latency_note": ", ".join([runtime_name(runtime), *shared]) if runtime and measured else "",
        "targets": [
            {**target, "got": "-" if target["got"] is None else target["got"]} for target in report.get("targets", [])
        ],
        "files": [file_facts(name, file) for name, file in report["files"].items()],
        "not_written": report.get("not_written", {}),
        "shape": shape,
        "preparation": preparation,
        "labels": labels[:SHOWN_LABELS],
        "hidden": max(0, len(labels) - SHOWN_LABELS),
        "snippets": [
            snippet
            for name, file in report["files"].items()
            for snippet in snippets(name, shape, file, preparation.get("inputs"))
        ],
        "terminal": None
        if preparation.get("inputs")
        else next((name for name in report["files"] if Path(name).suffix in SNIPPETS), None),
        "machine": machine_text(report["machine"]),
        "warnings": report.get("warnings", []),
        "left_alone": [left_text(left) for row in report["rows"] for left in row.get("left_alone", [])],
    }


def row_facts(name: str, row: dict[str, Any], size: tuple[str, int] | None, runtime: str | None) -> dict[str, str]:
    """A row as text; "-" for what was not measured."""
    latency = row.get("latency_ms", {}).get(runtime)
    span = f" ({milliseconds_span(latency['low'], latency['high'])})" if latency else ""
    return {
        "step": name,
        "score": "-" if row.get("score") is None else percent(row["score"]),
        "interval": percent_span(row["score_interval"]) if row.get("score_interval") else "-",
        "samples": f"{row['samples']:,}" if row.get("samples") and row.get("score") is not None else "-",
        "size": f"{bytes_text(size[1])} .{size[0]}" if size else "-",
        "latency": milliseconds_text(latency["median"]) + span if latency else "-",
    }


def file_facts(name: str, file: dict[str, Any]) -> dict[str, str]:
    score, error = file.get("score"), file.get("max_abs_error")
    return {
        "name": name,
        "size": f"{bytes_text(file['bytes'])} ({file['bytes']:,} bytes)",
        "score": "" if score is None else percent(score),
        "runtime": line(runtime_name(file.get("runtime") or "its runtime")),
        "error": "" if error is None else f"{error:.2g}",
        "sha256": file["sha256"],
    }


def left_text(left: dict[str, Any]) -> str:
    """What one step left alone, in a sentence."""
    why = "; ".join(f"{share_text(each['share'])} {each['why']} ({some(each['layers'])})" for each in left["reasons"])
    return f"{left['step']} left {share_text(left['share'])} of the {left['of']} alone: {why}."


def snippets(
    name: str, shape: list[int] | None, file: dict[str, Any], inputs: Sequence[dict[str, Any]] | None = None
) -> list[dict[str, str]]:
    """How to load a file: five lines per runtime in which it was checked; none for a format that is not known.

    Args:
        inputs: what the model takes where that is not an image.
    """
    sizes = ", ".join(map(str, shape)) if shape else "3, 224, 224"
    found = []
    checked = [runtime_name(each) for each in file.get("checked", [file.get("runtime")]) if each]
    for head, imports, load, call in SNIPPETS.get(Path(name).suffix, ()):
        if Path(name).suffix == ".onnx" and head not in checked:
            continue
        zeros = f"torch.zeros(1, {sizes})" if "torch" in imports else f'numpy.zeros((1, {sizes}), "float32")'
        lines = [
            imports,
            f"model = {load.format(name=json.dumps(name))}",
            f"images = {zeros}  # prepared as above",
            f"logits = {call.format()}",
            "print(logits.argmax(-1))",
        ]
        if inputs:
            lines[2:] = [
                f"inputs = [{', '.join(_zeros(each, 'torch' in imports) for each in inputs)}]  # of the kinds above",
                f"outputs = {_ON_ALL.get(head, 'model(*inputs)')}",
                "print(outputs)",
            ]
        found.append({"head": f"{head} (`{code(name)}`):", "code": "\n".join(lines)})
    return found


def _zeros(each: dict[str, Any], torch: bool) -> str:
    """One sample of an input, in code."""
    sizes = ", ".join(map(str, [1, *each["shape"]]))
    return (
        f"torch.zeros({sizes}, dtype=torch.{each['dtype']})" if torch else f'numpy.zeros(({sizes},), "{each["dtype"]}")'
    )


def machine_text(machine: dict[str, Any]) -> str:
    """The machine in a few words: processor, cores, memory, system, and the versions that were measured."""
    said = [plain(machine[key]) for key in ("cpu", "os") if machine.get(key)]
    if machine.get("cores"):
        said.insert(1, f"{machine['cores']} cores")
    if machine.get("memory_bytes"):
        said.append(f"{bytes_text(machine['memory_bytes'])} of memory")
    packages = machine.get("packages")
    if isinstance(packages, dict):
        said += [f"{name} {version}" for name, version in packages.items() if version]
    return ", ".join(said) or "a machine that was not described"
