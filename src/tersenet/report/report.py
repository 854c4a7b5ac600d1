"""report.json: built, checked, written and read. schema.json beside this file says what it looks like."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tersenet.atomic import writing
from tersenet.errors import FileError
from tersenet.numerics.scale import ACCURACY, Scale
from tersenet.report.check import faults
from tersenet.report.headline import verdict

__all__ = ["new_report", "read_json", "row", "target", "validate", "verdict", "write_json"]

SCHEMA = 1
# Rounding in the last digits of an interval's end is no disagreement (Wilson's end for 100 % is 1 - 1e-16).
ROUNDING = 1e-9


def row(
    step: str,
    *,
    score: float | None = None,
    score_interval: Sequence[float] | None = None,
    scores: Mapping[str, float] | None = None,
    top5: float | None = None,
    samples: int | None = None,
    params: int | None = None,
    macs: int | None = None,
    param_bytes: int | None = None,
    file_bytes: Mapping[str, int] | None = None,
    latency_ms: Mapping[str, Mapping[str, Any]] | None = None,
    peak_bytes: Mapping[str, int] | None = None,
    layers: Sequence[Mapping[str, Any]] | None = None,
    notes: Sequence[str] | None = None,
    left_alone: Sequence[Mapping[str, Any]] | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """One row of a report: the model after a step. What is not known is left out; flops are 2 x macs.

    Args:
        step: "original", or the step's name.
        score: that of the first runtime named, as the report's metric counts it.
        score_interval: its 95 % interval, (low, high).
        scores: by runtime, "pytorch" included.
        samples: how many the score rests on.
        file_bytes: by format, such as {"onnx": 3616431, "terse": 3300000}.
        latency_ms: by runtime, each {"median", "low", "high", "threads", "batch"}, and where turns were shared with
            the original "left_interval", of the share of its time that is left.
        peak_bytes: by runtime, memory beyond the runtime's own while the file runs.
        layers: per layer {"path", "kind", "params", "macs", "bytes", "note"}.
        notes: what the step's plan says, in words.
        left_alone: what the step, or each of those in it, could not touch: {"step", "of", "share", "reasons": [{"why",
            "layers", "share"}], "advice"} (left_alone.py).
        seconds: what the step took.
    """
    known: dict[str, Any] = {
        "step": step,
        "score": score,
        "score_interval": None if score_interval is None else list(score_interval),
        "scores": None if scores is None else dict(scores),
        "top5": top5,
        "samples": samples,
        "params": params,
        "macs": macs,
        "flops": None if macs is None else 2 * macs,
        "param_bytes": param_bytes,
        "file_bytes": None if file_bytes is None else dict(file_bytes),
        "latency_ms": None if latency_ms is None else {name: dict(value) for name, value in latency_ms.items()},
        "peak_bytes": None if not peak_bytes else dict(peak_bytes),
        "layers": None if layers is None else [dict(layer) for layer in layers],
        "notes": None if notes is None else list(notes),
        "left_alone": None if not left_alone else [dict(each) for each in left_alone],
        "seconds": seconds,
    }
    return {key: value for key, value in known.items() if value is not None}


def target(what: str, wanted: str | float, got: str | float | None, met: bool) -> dict[str, Any]:
    """A target and what became of it. Both values in one unit ("0.5x" and "0.56x"), so that the miss can be said."""
    return {"what": what, "wanted": wanted, "got": got, "met": met}


def new_report(
    *,
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    files: Mapping[str, Mapping[str, Any]] | None = None,
    not_written: Mapping[str, str] | None = None,
    recipe: str | None = None,
    brief_recipe: str | None = None,
    commands: Sequence[str] = (),
    targets: Sequence[Mapping[str, Any]] = (),
    preparation: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    metric: Scale = ACCURACY,
) -> dict[str, Any]:
    """A whole report with its verdict, checked. The first row is the original, the last row is what ships.

    Args:
        brief_recipe: the recipe without the settings that are at their defaults, for people.
        not_written: file -> why it could not be written, where others could.
        settings: as asked for; "model", "data" and "runtime" are read by page and card where they are there.
        metric: what scores are counted in.
    Raises:
        FileError: when a part does not fit the schema.
    """
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "machine": dict(machine),
        "settings": dict(settings),
        "metric": metric.to_json(),
        "rows": [dict(entry) for entry in rows],
        "files": {name: dict(entry) for name, entry in (files or {}).items()},
        "not_written": dict(not_written) if not_written else None,
        "verdict": "-",
        "recipe": recipe,
        "brief_recipe": brief_recipe,
        "commands": list(commands),
        "targets": [dict(entry) for entry in targets],
        "preparation": None if preparation is None else dict(preparation),
        "warnings": list(warnings),
    }
    report = json.loads(json.dumps({key: value for key, value in report.items() if value is not None}))
    validate(report)
    report["verdict"] = verdict(report)
    return report


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of report.json."""
    return json.loads((Path(__file__).parent / "schema.json").read_text(encoding="utf-8"))


def validate(report: Any) -> None:
    """Checks a report against the schema, and that its numbers agree with each other.

    Raises:
        FileError: naming the first fault and how many there are.
    """
    found = faults(report, schema(), schema()) or disagreements(report)
    if found:
        more = f" (and {len(found) - 1} more faults)" if len(found) > 1 else ""
        raise FileError(
            f"this is no report of schema {SCHEMA}: {found[0]}{more}; write it anew with this version of tersenet"
        )


def disagreements(report: dict[str, Any]) -> list[str]:
    """What no schema can say: medians and scores lie in their intervals, flops are 2 x macs."""
    found = []
    for index, entry in enumerate(report["rows"]):
        where = f"report.rows[{index}]"
        if "flops" in entry and "macs" in entry and entry["flops"] != 2 * entry["macs"]:
            found.append(f"{where}.flops is {entry['flops']} and must be 2 x macs = {2 * entry['macs']}")
        score, interval = entry.get("score"), entry.get("score_interval")
        if score is not None and interval is not None and not inside(score, *interval):
            found.append(f"{where}.score is {score} and must lie in score_interval {interval}")
        for runtime, latency in entry.get("latency_ms", {}).items():
            if not inside(latency["median"], latency["low"], latency["high"]):
                found.append(
                    f"{where}.latency_ms.{runtime}.median is {latency['median']} and must lie in "
                    f"[{latency['low']}, {latency['high']}]"
                )
    return found


def inside(value: float, low: float, high: float) -> bool:
    return low - ROUNDING <= value <= high + ROUNDING


def write_json(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a report, whole or not at all. Raises FileError when it does not fit the schema."""
    validate(report)
    with writing(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a report and checks it. Raises FileError when it is not there, cut short, or no report of ours."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(
            f"{path} cannot be read as a report ({error}); give the report.json of a finished run"
        ) from error
    try:
        validate(report)
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    return report
