"""Holds a run or a file to limits, for other people's continuous integration.

A run folder is judged by what its report says: nothing is measured again. A file is measured now, on this machine;
what its limits are relative to is in the report of the run folder that it lies in.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersenet.deploy.left_in_float import integer_operators, left_in_float
from tersenet.deploy.measure import measure_files, serving
from tersenet.deploy.tensorrt import broken_rules
from tersenet.errors import FileError, SettingsError
from tersenet.numerics.scale import Scale
from tersenet.report.headline import float_file_bytes, smallest_bytes
from tersenet.run import Run
from tersenet.ship import READS, sha256


@dataclass(frozen=True)
class Limits:
    """What must hold, as typed.

    Args:
        drop: points of score lost.
        latency: "3ms", or "0.5x" of the original's.
        bytes: "300000", or "0.1x" of the original's .onnx, else .terse.
        runtime: where the latency is; None takes the run's first, or the file's own.
        fused: whether the runtime must have made integer operators of all between the first and the last rounding.
    """

    drop: float | None = None
    latency: str | None = None
    bytes: str | None = None
    runtime: str | None = None
    fused: bool = False


def gate(
    source: Path,
    max_drop: float | None = None,
    max_latency: str | None = None,
    max_bytes: str | None = None,
    runtime: str | None = None,
    fused: bool = False,
) -> dict[str, Any]:
    """Holds a finished run, or a file, to limits: {"met": bool, "targets": [{"what", "wanted", "got", "met"}]}.

    The target of `fused` has "operators" too, the names of what is left in float. A file for TensorRT, which ends in
    .tensorrt.onnx, is held to its rules instead.

    Args:
        source: a run folder, or a file; only a file that lies in its run folder can be held to a share or a drop.
        max_drop, max_latency, max_bytes, runtime, fused: as in Limits. Of a run, bytes are those of its
            .terse file, else of the next that it has.
    Raises:
        SettingsError: on no limit, one that cannot be read, or one that needs what the report does not have.
        RunError, FileError: when there is no finished run, or no such file.
    """
    limits = Limits(max_drop, max_latency, max_bytes, runtime, fused)
    if max_drop is None and max_latency is None and max_bytes is None and not fused:
        raise SettingsError("nothing to check: give --max-drop, --max-latency, --max-bytes or --fused")
    targets = _of_file(source, limits) if source.is_file() or source.suffix else _of_run(source, limits)
    return {"met": all(each["met"] for each in targets), "targets": targets}


def gate_text(found: dict[str, Any]) -> str:
    """A line per limit, for a terminal."""
    return "\n".join(
        f"{'met   ' if each['met'] else 'MISSED'}  {each['what']}: {_figure(each['got'])} "
        f"(at most {_figure(each['wanted'])})" + "".join(f"\n        {name}" for name in each.get("operators", []))
        for each in found["targets"]
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 10_000 else f"{value:.4g}"


def _of_run(folder: Path, limits: Limits) -> list[dict[str, Any]]:
    report = Run(folder).report
    first, last = report["rows"][0], report["rows"][-1]
    targets = []
    if limits.drop is not None:
        targets.append(_drop(str(folder), report, last.get("score"), limits.drop))
    if limits.latency is not None:
        name = limits.runtime or next(iter(last["latency_ms"]))
        if name not in last["latency_ms"]:
            raise SettingsError(f"{folder} has no latency in {name!r}; it has one in {', '.join(last['latency_ms'])}")
        limit = _limit("--max-latency", limits.latency, "ms", first["latency_ms"][name]["median"])
        targets.append(_target(f"ms in {name}", limit, last["latency_ms"][name]["median"]))
    if limits.bytes is not None:
        limit = _limit("--max-bytes", limits.bytes, "", _original_bytes(first))
        kind, size = _counted(last)
        targets.append(_target(f"bytes of model.{kind}", limit, size))
    if limits.fused:
        name = limits.runtime or next(iter(last["latency_ms"]))
        if name not in READS:
            raise SettingsError(f"{folder} has no file for {name!r}; name one of {', '.join(READS)}, or check a file")
        targets.append(_fused(Run(folder).file(f"model.{READS[name]}"), name))
    return targets


def _of_file(path: Path, limits: Limits) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileError(f"there is no file {path}; check the path")
    runtime = serving(path, None if limits.runtime is None else [limits.runtime])[0]
    report = Run(path.parent).report if (path.parent / "report.json").is_file() else None
    first = None if report is None else report["rows"][0]
    targets = []
    if limits.drop is not None:
        entry = {} if report is None else report["files"].get(path.name, {})
        if report is None or first is None or entry.get("sha256") != sha256(path):
            raise SettingsError(
                f"{path} does not lie in its run folder, so its score is not known; check the run folder"
            )
        # A .terse file computes what PyTorch does, bit for bit.
        score = (
            (report["rows"][-1].get("scores") or {}).get("pytorch") if path.suffix == ".terse" else entry.get("score")
        )
        targets.append(_drop(str(path), report, score, limits.drop))
    if limits.latency is not None:
        was = None if first is None else first["latency_ms"].get(runtime, {}).get("median")
        limit = _limit("--max-latency", limits.latency, "ms", was)
        found = measure_files([path], [runtime]).to_json()["files"][str(path)]
        targets.append(_target(f"ms in {runtime}", limit, found["latency_ms"][runtime]["median"]))
    if limits.bytes is not None:
        limit = _limit("--max-bytes", limits.bytes, "", None if first is None else _original_bytes(first))
        targets.append(_target(f"bytes of {path.name}", limit, path.stat().st_size))
    if limits.fused:
        targets.append(_fused(path, runtime))
    return targets


def _fused(path: Path, runtime: str) -> dict[str, Any]:
    """What a runtime leaves in float; a file in which it runs nothing in integers is refused."""
    if path.name.endswith(".tensorrt.onnx"):
        operators, what = broken_rules(path), "rules of TensorRT broken"
    else:
        operators, what = left_in_float(path, runtime), f"operators left in float in {runtime}"
        if not operators and not integer_operators(path, runtime):
            raise SettingsError(f"{path} runs in float in {runtime}, so there is nothing to fuse; check an int8 file")
    return {**_target(what, 0, len(operators)), "operators": operators}


def _drop(what: str, report: dict[str, Any], score: float | None, limit: float) -> dict[str, Any]:
    first, scale = report["rows"][0], Scale.of(report)
    if score is None or first.get("score") is None:
        raise SettingsError(f"{what} has no score, so its drop cannot be checked; run compress on labelled data")
    name = "score" if scale.name == "accuracy" else scale.name
    return _target(f"{scale.loss_unit} of {name} lost".strip(), limit, round(scale.lost(first["score"], score), 4))


def _target(what: str, wanted: float, got: float) -> dict[str, Any]:
    return {"what": what, "wanted": wanted, "got": got, "met": got <= wanted}


def _original_bytes(first: dict[str, Any]) -> int:
    return float_file_bytes({"rows": [first]})[1]  # type: ignore[index]


def _counted(row: dict[str, Any]) -> tuple[str, int]:
    found = smallest_bytes(row)
    if found is None:
        raise SettingsError("the report names no file, so that no bytes can be checked; check a file")
    return found


def _limit(option: str, text: str, unit: str, original: float | None) -> float:
    """ "3ms" as 3, "0.5x" as half of the original's."""
    share = text.endswith("x")
    try:
        value = float(text.removesuffix("x") if share else text.removesuffix(unit))
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        example = f"3{unit}" if unit else "300000"
        raise SettingsError(f"{option} is {text!r}; give a limit such as {example}, or 0.5x of the original's")
    if share and original is None:
        raise SettingsError(f"{option} is {text!r}, but the original is not known here; give a limit with no x")
    return value * (original or 1.0) if share else value
