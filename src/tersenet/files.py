"""What can be done with files and finished runs: measure, export and pack them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tersenet.data import open_data
from tersenet.data.checks import check_same_classes
from tersenet.deploy.artifact import load_terse, save_terse, terse_preparation
from tersenet.deploy.checked import CHECKED, checked
from tersenet.deploy.made_inputs import made_example
from tersenet.deploy.measure import measure_files as measure_in_runtimes
from tersenet.deploy.measure import serving
from tersenet.deploy.reference import Reference
from tersenet.deploy.runtimes import Runner, open_file, runtime_for
from tersenet.deploy.stand_in import StandIn
from tersenet.deploy.verify import score_file
from tersenet.errors import InputWarning, SettingsError
from tersenet.exports import WRITTEN, write_checked
from tersenet.graph.costs import totals
from tersenet.numerics.scale import ACCURACY
from tersenet.preparations import AS_SAID, Preparing, preparation_of
from tersenet.report.words import (
    bytes_text,
    left_text,
    milliseconds_span,
    milliseconds_text,
    runtime_name,
)
from tersenet.run import Run
from tersenet.sources import example_for, example_of, open_model, takes_image
from tersenet.task import Preparation, Score, Task, scored_output

if TYPE_CHECKING:
    from rich.table import Table


def measure_files(
    files: Sequence[Path],
    runtimes: Sequence[str] | None = None,
    data: str | None = None,
    *,
    threads: int = 1,
    batch: int = 1,
    turns: int = 20,
    cold: bool = False,
    openings: int = 1,
    columns: tuple[str, str] | None = None,
    on_bad_image: str = "stop",
    preparing: Preparing = AS_SAID,
    quiet: bool = False,
) -> dict[str, Any]:
    """Times files against each other, each in every named runtime that reads it; with data, scores them there too.

    Args:
        files: named once each.
        runtimes: None takes for each file the first that reads it.
        preparing: how images become inputs, in place of what the files say.
    Returns:
        {"machine", "files": {PATH: {"latency_ms": {runtime: ...}, "score", ...}}, "ratios": [...]}.
    Raises:
        SettingsError: on more threads than cores, or a file that no named runtime reads.
        FileError: when a file is damaged, or the process that runs it dies.
    """
    _say_unchecked(files, runtimes)
    # Scores come first: data that does not fit a file is heard of before minutes of timing.
    scored = (
        [] if data is None else list(_scored(files, runtimes, data, threads, columns, on_bad_image, preparing, quiet))
    )
    found = measure_in_runtimes(
        files, runtimes, size=preparing.size, batch=batch, threads=threads, turns=turns, cold=cold, openings=openings,
        progress=not quiet,
    ).to_json()  # fmt: skip
    for path, runtime, output, score in scored:
        entry = found["files"][path]
        if output is not None:
            entry["scored_output"] = output
        entry.setdefault("scores", {})[runtime] = score.value
        entry.setdefault("score", score.value)
        entry.setdefault("score_interval", list(score.interval or ()))
        entry.setdefault("samples", score.samples)
        if score.top5 is not None:
            entry.setdefault("top5", score.top5)
    return found


def _say_unchecked(files: Sequence[Path], runtimes: Sequence[str] | None) -> None:
    """Warns of files that run in a runtime in which nobody held them to their model."""
    for path in files:
        for runtime in serving(path, runtimes):
            if path.suffix.lower() != ".onnx" or runtime == runtime_for(path):
                continue
            known = open_file(path, runtime).metadata.get(CHECKED)
            if known is not None and runtime not in known.split(","):
                names = " and ".join(map(runtime_name, known.split(",")))
                warnings.warn(
                    f"{path} was checked in {names} alone: what it computes in {runtime_name(runtime)} may differ from "
                    f"its model; name {runtime} in --runtime when it is made, or write one: export --to {runtime}",
                    InputWarning,
                    stacklevel=2,
                )


def _scored(
    files: Sequence[Path],
    runtimes: Sequence[str] | None,
    data: str,
    threads: int,
    columns: tuple[str, str] | None,
    on_bad_image: str,
    preparing: Preparing,
    quiet: bool,
) -> Iterator[tuple[str, str, str | None, Score]]:
    """(file, runtime, the output that is scored where there are several, score); all are checked before the first."""
    ready = []
    for path in files:
        for runtime in serving(path, runtimes):
            runner = open_file(path, runtime, threads)
            preparation = preparation_of(runner, preparing, data, columns)
            sources = open_data(data, preparation, columns=columns, on_bad_image=on_bad_image, quiet=quiet)
            check_same_classes(sources, preparation.labels, str(path), data)
            if sources.test is None:
                raise SettingsError(
                    f"--data {data} has no labelled test part to score on; leave --data out to time only"
                )
            example = example_of(preparation)
            ready.append((path, runner, example, sources.test, scored_of_file(runner, example)))
    for path, runner, example, test, output in ready:
        yield str(path), runner.runtime, output, score_file(runner, Task(example=example), test)


def scored_of_file(runner: Runner, example: Tensor) -> str | None:
    """Which of several outputs is scored, None where there is one. Raises ModelError where it is unclear."""
    outputs = StandIn(runner)(example)
    return None if isinstance(outputs, Tensor) else scored_output(outputs)[0]


def measure_table(found: dict[str, Any]) -> Table:
    """The same for a terminal of 80 columns: a row per file and runtime, under each value its 95 % interval."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from tersenet.report.terminal import cell

    entries = found["files"]
    heads = ["latency", "against the first"]
    heads += (
        ["samples/s"]
        if any(each["batch"] > 1 for entry in entries.values() for each in entry["latency_ms"].values())
        else []
    )
    heads += ["score"] if any("score" in entry for entry in entries.values()) else []
    heads += ["loading"] if any("footprint" in entry for entry in entries.values()) else []
    scored = {entry["scored_output"] for entry in entries.values() if "scored_output" in entry}
    caption = found["verdict"] + "".join(f"\nscores output {name!r}" for name in sorted(scored))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    table.add_column("file", overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    against = {(each["a"], each["runtime"]): each for each in reversed(found["ratios"])}
    for path, entry in entries.items():
        for runtime, latency in entry["latency_ms"].items():
            ratio = against.get((path, runtime))
            score = entry.get("scores", {}).get(runtime)
            foot = entry.get("footprint", {}).get(runtime, {})
            cells = {
                "latency": cell(
                    milliseconds_text(latency["median"]), milliseconds_span(latency["low"], latency["high"])
                ),
                "samples/s": cell(f"{entry['samples_per_s'][runtime]['median']:,.0f}", f"batch {latency['batch']}"),
                "against the first": cell("")
                if ratio is None
                else cell(_difference(ratio), f"{left_text(ratio['low'])}-{left_text(ratio['high'])}"),
                "score": cell("")
                if score is None
                else cell(ACCURACY.text(score), ACCURACY.span(entry["score_interval"])),
                "loading": cell(f"{foot['load_ms']:.0f} ms", bytes_text(foot["peak_bytes"])) if foot else cell(""),
            }
            table.add_row(
                Text(path).append(f"\n{runtime_name(runtime)}", style="dim"), *(cells[head] for head in heads)
            )
    return table


def _difference(ratio: dict[str, Any]) -> str:
    """ "1.30x faster"; a difference is named only where the interval of the ratio leaves 1 out."""
    if ratio["difference"] == "none shown":
        return "not told apart"
    factor = ratio["ratio"] if ratio["difference"] == "slower" else 1 / ratio["ratio"]
    return f"{factor:.2f}x {ratio['difference']}"


def _source(source: str | Path, image_size: Sequence[int] | None = None) -> tuple[nn.Module, Preparation | None, str]:
    """The model of a run folder, a .terse or a float .onnx file, how its inputs are prepared where it takes one image,
    and a stem for files made from it."""
    path = Path(source)
    if path.suffix == ".onnx":
        from tersenet.onnx_import import open_onnx

        return *open_onnx(path, image_size), path.stem
    if path.is_dir():
        path = Run(path).file("model.terse")
    model = load_terse(path)
    return model, terse_preparation(path) if takes_image(model) else None, path.stem


def export_to(
    source: Path, targets: Sequence[str], out: Path | None = None, image_size: Sequence[int] | None = None
) -> dict[str, dict[str, Any]]:
    """Writes a compressed model for runtimes, each file checked against PyTorch.

    Args:
        source: a run folder, a .terse or a float .onnx file.
        targets: of "onnx", "openvino", "tensorrt", "torch", "terse", "litert", "litert-fp16", "executorch"; the last
            three have a fixed batch of 1.
        out: the folder to write to; beside the source when None. What a run folder has already is kept and checked:
            its report tells the checksums of its files. One of those that is wrong is said, never removed.
        image_size: (H, W), for an .onnx file that takes images of any size.
    Returns:
        {file: {"bytes", "max_abs_error"}}; of a model with rounded activations also "left_in_float", the operators that
        the runtime does not run in integers. The error of a file for TensorRT is that against its own simulation.
    Raises:
        SettingsError: on another target.
        ExportError: when a file cannot be written, or is wrong.
    """
    unknown = sorted(set(targets) - set(WRITTEN))
    if unknown or not targets:
        raise SettingsError(f"--to is {', '.join(unknown) or 'empty'}; allowed: {', '.join(WRITTEN)}")
    model, preparation, stem = _source(source, image_size)
    own = set(Run(source).report["files"]) if out is None and source.is_dir() else set()
    folder = out if out is not None else (source if source.is_dir() else source.parent)
    example = made_example(model, str(source))
    for name in {"litert", "litert-fp16", "executorch"} & set(targets):
        _need_one_float(model, name)
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(targets):
        path = folder / f"{stem}{WRITTEN[name][0]}"
        if path.resolve() == source.resolve():
            raise SettingsError(f"{path} would be written over the file that it is made from; name a folder with --out")
        kept = path.name in own and path.is_file()
        found[str(path)] = write_checked(model, example, preparation, path, name, kept=kept)
    return found


def _need_one_float(model: Any, target: str) -> None:
    """Raises SettingsError where a model takes other inputs than those that files of a kind are written for."""
    dtypes = [each.dtype for each in model.inputs]
    if dtypes != ["float32"]:
        listed = ", ".join(f"{each.name} of {each.dtype}" for each in model.inputs)
        raise SettingsError(
            f"files for {target} are written of models that take one input of float32, and this one takes {listed}; "
            "choose onnx, openvino or torch"
        )


def pack(
    source: str, output: Path, weights: Path | None = None, image_size: Sequence[int] | None = None
) -> dict[str, Any]:
    """Writes a run's or a model's .terse file: {"file", "bytes", "ratio" against its float32 parameters}."""
    if output.suffix != ".terse":
        raise SettingsError(f"the file to write is {output}; it must end in .terse")
    if Path(source).is_dir():
        model, preparation, _ = _source(source)
    else:
        model, preparation = open_model(source, weights, image_size=image_size)
    example = example_for(model, preparation)
    save_terse(model, example, output, preparation)
    agreement = checked(output, ["pytorch"], Reference(model, example, [(example, None)]))["pytorch"]
    cost = totals(model, example)
    size = output.stat().st_size
    return {
        "file": str(output),
        "bytes": size,
        "float32_bytes": 4 * cost.params,
        "ratio": 4 * cost.params / size,
        **agreement.to_json(),
    }
