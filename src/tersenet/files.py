"""What can be done with files and finished runs: measure, export, pack, and hold them to targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from tersenet.data import open_data
from tersenet.deploy.artifact import load_terse, save_terse, terse_preparation
from tersenet.deploy.measure import measure_files as measure_in_runtimes
from tersenet.deploy.measure import serving
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.pt2 import export_pt2
from tersenet.deploy.runtimes import Runner, open_file
from tersenet.deploy.verify import score_file, verify
from tersenet.errors import SettingsError, require
from tersenet.graph.costs import totals
from tersenet.run import Run
from tersenet.sources import example_of, open_model
from tersenet.task import Preparation, Task

if TYPE_CHECKING:
    from rich.table import Table


def preparation_of(runner: Runner) -> Preparation:
    """How a file's inputs are prepared, as the file itself says; raises SettingsError where it does not."""
    found = Preparation.of_metadata(runner.metadata)
    if found is None:
        raise SettingsError(f"{runner.name} does not say how its inputs are prepared; it was not written by tersenet")
    return found


def measure_files(
    files: Sequence[Path],
    runtimes: Sequence[str],
    data: str | None = None,
    *,
    threads: int = 1,
    batch: int = 1,
    turns: int = 20,
    cold: bool = False,
    columns: tuple[str, str] | None = None,
    on_bad_image: str = "stop",
    quiet: bool = False,
) -> dict[str, Any]:
    """Times files against each other, each in every named runtime that reads it; with data, scores them there too.

    Returns:
        {"machine", "files": {PATH: {"latency_ms": {runtime: ...}, "score", ...}}, "ratios": [...]}.
    """
    opened = [
        (str(path), runtime, open_file(path, runtime, threads)) for path in files for runtime in serving(path, runtimes)
    ]
    found = measure_in_runtimes(
        files, runtimes, batch=batch, threads=threads, turns=turns, cold=cold, progress=not quiet
    ).to_json()
    if data is not None:
        for path, runtime, runner in opened:
            preparation = preparation_of(runner)
            sources = open_data(data, preparation, columns=columns, on_bad_image=on_bad_image)
            if sources.test is None:
                raise SettingsError(
                    f"--data {data} has no labelled test part to score on; leave --data out to time only"
                )
            score = score_file(runner, Task(example=example_of(preparation)), sources.test)
            entry = found["files"][path]
            entry.setdefault("scores", {})[runtime] = score.value
            entry.setdefault("score", score.value)
            entry.setdefault("score_interval", [score.low, score.high])
            entry.setdefault("samples", score.samples)
            if score.top5 is not None:
                entry.setdefault("top5", score.top5)
    return found


def measure_table(found: dict[str, Any]) -> Table:
    """The same for a terminal: a row per file and runtime, then the ratios."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), caption=found["verdict"], caption_justify="left")
    for title in ("file", "runtime", "ms", "95 % interval", "of the first", "score", "peak MiB", "load ms"):
        table.add_column(title, justify="left" if title in ("file", "runtime") else "right")
    left = {(each["a"], each["runtime"]): each for each in reversed(found["ratios"])}
    for path, entry in found["files"].items():
        for runtime, latency in entry["latency_ms"].items():
            ratio = left.get((path, runtime))
            score = entry.get("scores", {}).get(runtime)
            peak, load = entry.get("peak_bytes"), entry.get("load_ms")
            table.add_row(
                path,
                runtime,
                f"{latency['median']:.3f}",
                f"{latency['low']:.3f}-{latency['high']:.3f}",
                "" if ratio is None else f"{ratio['ratio']:.3f} ({1 / ratio['ratio']:.2f}x)",
                "" if score is None else f"{100 * score:.2f} %",
                "" if peak is None else f"{peak / 2**20:.1f}",
                "" if load is None else f"{load:.0f}",
            )
    return table


def _source(source: str | Path) -> tuple[nn.Module, Preparation, str]:
    """The model of a run folder or of a .terse file, and a stem for files made from it."""
    path = Path(source)
    if path.is_dir():
        path = Run(path).file("model.terse")
    return load_terse(path), terse_preparation(path), path.stem


def export_to(source: Path, targets: Sequence[str], out: Path | None = None) -> dict[str, dict[str, Any]]:
    """Writes a compressed model for runtimes, each file checked against PyTorch: {file: {"bytes", "max_abs_error"}}.

    Args:
        source: a run folder or a .terse file.
        targets: of "onnx", "openvino", "torch".
        out: the folder to write to; beside the source when None.
    """
    unknown = set(targets) - {"onnx", "openvino", "torch"}
    if unknown or not targets:
        raise SettingsError(f"--to is {', '.join(sorted(unknown)) or 'empty'}; allowed: onnx, openvino, torch")
    model, preparation, stem = _source(source)
    folder = out if out is not None else (source if source.is_dir() else source.parent)
    example = example_of(preparation)
    found = {}
    for name in targets:
        if name == "torch":
            path = export_pt2(model, example, folder / f"{stem}.pt2", preparation.metadata())
        else:
            path = export_onnx(model, example, folder / f"{stem}.onnx", preparation)
        if name == "openvino":
            path = _openvino(path, folder / f"{stem}.xml")
        runtime = {"torch": "pytorch", "onnx": "onnxruntime", "openvino": "openvino"}[name]
        agreement = verify(open_file(path, runtime), model, [example])
        found[str(path)] = {"bytes": path.stat().st_size, "max_abs_error": agreement.max_abs_error}
    return found


def _openvino(onnx: Path, path: Path) -> Path:
    """An ONNX file as OpenVINO's own .xml and .bin."""
    openvino = require("openvino", "openvino", "write OpenVINO files")
    openvino.save_model(openvino.convert_model(str(onnx)), str(path), compress_to_fp16=False)
    return path


def pack(source: str, output: Path, weights: Path | None = None) -> dict[str, Any]:
    """Writes a run's or a model's .terse file: {"file", "bytes", "ratio" against its float32 parameters}."""
    if output.suffix != ".terse":
        raise SettingsError(f"the file to write is {output}; it must end in .terse")
    if Path(source).is_dir():
        model, preparation, _ = _source(source)
    else:
        model, preparation = open_model(source, weights)
    save_terse(model, example_of(preparation), output, preparation)
    cost = totals(model, example_of(preparation))
    size = output.stat().st_size
    return {"file": str(output), "bytes": size, "float32_bytes": 4 * cost.params, "ratio": 4 * cost.params / size}


def gate(
    folder: Path,
    max_drop: float | None = None,
    max_latency: str | None = None,
    max_bytes: str | None = None,
    runtime: str | None = None,
) -> dict[str, Any]:
    """Holds a finished run to limits: {"met": bool, "targets": [{"what", "wanted", "got", "met"}]}.

    Args:
        max_drop: points of score.
        max_latency: "3ms", or "0.5x" of the original's, in the run's first runtime or in `runtime`.
        max_bytes: "300000", or "0.1x" of the original's; of the .terse file against the original's .onnx, else .terse.
    """
    report = Run(folder).report
    first, last = report["rows"][0], report["rows"][-1]
    if max_drop is None and max_latency is None and max_bytes is None:
        raise SettingsError("nothing to check: give --max-drop, --max-latency or --max-bytes")
    targets = []
    if max_drop is not None:
        if last.get("score") is None:
            raise SettingsError(f"{folder} has no score, so its drop cannot be checked; run compress on labelled data")
        drop = 100 * (first["score"] - last["score"])
        targets.append({"what": "drop in points", "wanted": max_drop, "got": round(drop, 4), "met": drop <= max_drop})
    if max_latency is not None:
        name = runtime or next(iter(last["latency_ms"]))
        if name not in last["latency_ms"]:
            raise SettingsError(f"{folder} has no latency in {name!r} (it has {', '.join(last['latency_ms'])})")
        limit = _limit("--max-latency", max_latency, "ms", first["latency_ms"][name]["median"])
        got = last["latency_ms"][name]["median"]
        targets.append({"what": f"ms in {name}", "wanted": limit, "got": got, "met": got <= limit})
    if max_bytes is not None:
        was = first["file_bytes"].get("onnx", first["file_bytes"]["terse"])
        limit, got = _limit("--max-bytes", max_bytes, "", was), last["file_bytes"]["terse"]
        targets.append({"what": "bytes of model.terse", "wanted": limit, "got": got, "met": got <= limit})
    return {"met": all(each["met"] for each in targets), "targets": targets}


def _limit(option: str, text: str, unit: str, original: float) -> float:
    """ "3ms" as 3, "0.5x" as half of the original's."""
    share = text.endswith("x")
    try:
        value = float(text.removesuffix("x") if share else text.removesuffix(unit))
    except ValueError:
        value = -1.0
    if value <= 0:
        example = f"3{unit}" if unit else "300000"
        raise SettingsError(f"{option} is {text!r}; give a limit such as {example}, or 0.5x of the original's")
    return value * original if share else value
