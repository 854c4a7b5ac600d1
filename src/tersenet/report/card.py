"""The README.md of a run folder: a model card after M. Mitchell et al., "Model Cards for Model Reporting", 2019.

It says what the model is, how it scores, how each file is loaded in its own runtime, how an input is prepared, and what
was not tested. The text is card.md; what comes from a report cannot break out of its line, table cell or code span.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tersenet.atomic import writing
from tersenet.left_alone import share_text, some
from tersenet.numerics.scale import ACCURACY, Scale
from tersenet.report.headline import deployed, first_runtime
from tersenet.report.report import validate
from tersenet.report.snippets import SNIPPETS, shape_of, snippets
from tersenet.report.words import bytes_text, milliseconds_span, milliseconds_text, plain, runtime_name

# More labels than these would bury the rest of the card.
SHOWN_LABELS = 40


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
    scale, kind = Scale.of(report), deployed(report)
    first, last = report["rows"][0], report["rows"][-1]
    rows = [("original", first), *([("this model", last)] if last is not first else [])]
    labels = preparation.get("labels", [])
    measured = last.get("latency_ms", {}).get(runtime)
    shared = [f"{key} {measured[key]}" for key in ("threads", "batch") if key in measured] if measured else []
    return {
        "name": settings.get("model") or "A compressed model",
        "data": settings.get("data"),
        "verdict": report["verdict"],
        "metric": scale.heading,
        "classifies": scale == ACCURACY,
        "kind": kind if kind != "terse" else None,
        "rows": [row_facts(name, row, kind, runtime, scale) for name, row in rows],
        "latency_note": ", ".join([runtime_name(runtime), *shared]) if runtime and measured else "",
        "targets": [
            {**target, "got": "-" if target["got"] is None else target["got"]} for target in report.get("targets", [])
        ],
        "files": [file_facts(name, file, scale) for name, file in report["files"].items()],
        "not_written": report.get("not_written", {}),
        "shape": shape_of(preparation) if "std" in preparation else None,
        "preparation": preparation,
        "labels": labels[:SHOWN_LABELS],
        "hidden": max(0, len(labels) - SHOWN_LABELS),
        "snippets": [
            {"head": f"{head} (`{code(name)}`):", "code": lines}
            for name, file in report["files"].items()
            for head, lines in snippets(name, preparation, file, scale)
        ],
        "terminal": None
        if preparation.get("inputs")
        else next((name for name in report["files"] if Path(name).suffix in SNIPPETS), None),
        "machine": machine_text(report["machine"]),
        "warnings": report.get("warnings", []),
        "left_alone": [left_text(left) for row in report["rows"] for left in row.get("left_alone", [])],
    }


def row_facts(name: str, row: dict[str, Any], kind: str | None, runtime: str | None, scale: Scale) -> dict[str, str]:
    """A row as text; "-" for what was not measured."""
    latency, sizes = row.get("latency_ms", {}).get(runtime), row.get("file_bytes", {})
    span = f" ({milliseconds_span(latency['low'], latency['high'])})" if latency else ""
    return {
        "step": name,
        "score": "-" if row.get("score") is None else scale.text(row["score"]),
        "interval": scale.span(row["score_interval"]) if row.get("score_interval") else "-",
        "samples": f"{row['samples']:,}" if row.get("samples") and row.get("score") is not None else "-",
        "size": bytes_text(sizes[kind]) if sizes.get(kind) else "-",
        "terse": bytes_text(sizes["terse"]) if sizes.get("terse") else "-",
        "latency": milliseconds_text(latency["median"]) + span if latency else "-",
    }


def file_facts(name: str, file: dict[str, Any], scale: Scale) -> dict[str, str]:
    score, error = file.get("score"), file.get("max_abs_error")
    return {
        "name": name,
        "size": f"{bytes_text(file['bytes'])} ({file['bytes']:,} bytes)",
        "score": "" if score is None else scale.text(score),
        "runtime": line(runtime_name(file.get("runtime") or "its runtime")),
        "error": "" if error is None else f"{error:.2g}",
        "sha256": file["sha256"],
    }


def left_text(left: dict[str, Any]) -> str:
    """What one step left alone, in a sentence."""
    why = "; ".join(f"{share_text(each['share'])} {each['why']} ({some(each['layers'])})" for each in left["reasons"])
    return f"{left['step']} left {share_text(left['share'])} of the {left['of']} alone: {why}."


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
