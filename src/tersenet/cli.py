"""The command line: parse, call, print. What a command does lives in the module that it imports.

Exit codes: 0 done; 1 a target was not met (the result is written and reported all the same); 2 wrong use or bad input,
said in one sentence. With --json, standard output holds one JSON object and nothing else.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tersenet.errors import InputWarning, SettingsError
from tersenet.options import (
    Batch,
    Bytes,
    Columns,
    Crop,
    Data,
    Device,
    Epochs,
    ImageSize,
    Interpolation,
    Json,
    Latency,
    Macs,
    MaxDrop,
    MaxHours,
    Mean,
    Memory,
    Model,
    OnBadImage,
    Out,
    Quiet,
    RecipeFile,
    Resolutions,
    Resume,
    Runtime,
    Seed,
    Std,
    TableFile,
    Threads,
    Validate,
    Weights,
    names_in,
    pair_of,
    preparing_of,
)
from tersenet.outcome import WRONG_USE, failed, file_line, finish, say, show, wrong_use

if TYPE_CHECKING:
    from torch import nn

    from tersenet.preparations import Preparing
    from tersenet.task import Task

app = typer.Typer(
    name="tersenet",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes leave 20 columns for the words
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Makes trained neural networks smaller and faster, and proves it on the file that ships.",
)
_debug = False


def main() -> None:
    """The entry point: runs a command and turns what goes wrong into one sentence and an exit code."""
    try:
        code = app(prog_name="tersenet", standalone_mode=False)
    except WRONG_USE as error:
        code = wrong_use(error)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:  # exit code 1 says that a target was missed, so that no error may end with it
        if _debug:
            raise
        code = failed(error)
    if code == 130:
        say("stopped; compress and demo go on when they are called again with the same --out")
    sys.exit(code or 0)


def _version(wanted: bool) -> None:
    if wanted:
        from tersenet import __version__

        print(f"tersenet {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    version: Annotated[bool, typer.Option("--version", help="show the version", callback=_version)] = False,
) -> None:
    global _debug
    _debug = debug
    if not debug:
        # Third-party chatter; our own warnings are shown as a sentence.
        warnings.simplefilter("ignore")
        from tersenet.errors import MadePermanent, NoEffect

        warnings.simplefilter("always", NoEffect)
        warnings.simplefilter("always", MadePermanent)
        warnings.simplefilter("always", InputWarning)
        warnings.filterwarnings("always", module=r"tersenet\.data\b")  # images that were left out
        warnings.showwarning = lambda message, category, *_, **__: print(f"warning: {message}", file=sys.stderr)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="the run folder")] = Path("runs/demo"),
    runtime: Runtime = "onnxruntime",
    seed: Seed = 0,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """The main job on built-in data, scikit-learn's digits. Trains a small net, compresses it, verifies and reports."""
    from tersenet.demo import run_demo

    finish(run_demo(out, names_in(runtime), seed=seed, quiet=quiet), json_)


@app.command()
def profile(
    model: Model,
    weights: Weights = None,
    data: Data = None,
    runtime: Annotated[
        str | None, typer.Option(help="onnxruntime, openvino or pytorch; several with commas (default: the first)")
    ] = None,
    threads: Threads = 1,
    batch: Batch = 1,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    interpolation: Interpolation = None,
    crop: Crop = None,
    columns: Columns = None,
    on_bad_image: OnBadImage = "stop",
    json_: Json = False,
) -> None:
    """Where time, bytes and multiply-adds go, and what to try. Per layer, with what limits it; MODEL may also be an
    .onnx file, float or quantized."""
    from tersenet.deploy.causes import explained
    from tersenet.deploy.profile import profile_file, profile_model
    from tersenet.deploy.profile_table import ProfilesTable, ProfileTable
    from tersenet.deploy.roofline import roofline
    from tersenet.sources import example_for

    runtimes = (None,) if runtime is None else names_in(runtime)
    preparing = preparing_of(mean, std, image_size, interpolation, crop)
    if model.endswith(".onnx"):
        if weights is not None or data is not None:
            raise SettingsError(f"{model} holds its own weights and is timed on noise; leave --weights and --data out")
        found = [
            profile_file(model, runtime=name, threads=threads, batch=batch, size=preparing.size) for name in runtimes
        ]
    else:
        network, task = _open(model, weights, data, preparing, columns, on_bad_image, quiet=True)
        example = task.example if data else example_for(network, task.preparation)
        found = [profile_model(network, example, runtime=name, threads=threads, batch=batch) for name in runtimes]
    roof = roofline(threads, say=say)
    found = [explained(each, roof) for each in found]
    if len(found) == 1:
        show(found[0], json_, lambda: ProfileTable(found[0]))
    else:
        show({"profiles": found}, json_, lambda: ProfilesTable(found))


@app.command()
def compress(
    model: Model,
    data: Annotated[str, typer.Option(help="digits, parquet:DIR, folder:DIR, hf:NAME (downloads) or random:3x224x224")],
    weights: Weights = None,
    recipe: RecipeFile = None,
    latency: Latency = None,
    bytes_: Bytes = None,
    macs: Macs = None,
    memory: Memory = None,
    max_drop: MaxDrop = None,
    runtime: Runtime = "onnxruntime",
    threads: Threads = 1,
    batch: Batch = 1,
    out: Out = Path("runs/compress"),
    resume: Resume = False,
    seed: Seed = 0,
    epochs: Epochs = 6,
    table: TableFile = None,
    resolutions: Resolutions = None,
    device: Device = "auto",
    max_hours: MaxHours = None,
    validate: Validate = None,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    interpolation: Interpolation = None,
    crop: Crop = None,
    columns: Columns = None,
    on_bad_image: OnBadImage = "stop",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Runs a recipe or meets a target, and proves it. Writes files for real runtimes, checked, scored and measured
    there, and a report; called again with the same --out, it goes on where it stopped."""
    from tersenet import job, sources
    from tersenet.ship import check_runtimes
    from tersenet.targets import Target, recipe_of

    # What is cheap to check comes before the data is read.
    target, runtimes = Target(latency, bytes_, macs, memory), names_in(runtime)
    check_runtimes(runtimes, threads)
    steps = recipe_of(
        recipe, target, epochs=epochs, data=data, runtime=runtimes[0], threads=threads, batch=batch, table=table,
        device=device, max_hours=max_hours, resolutions=names_in(resolutions or ""),
    )  # fmt: skip
    if resume and not (out / "run.json").exists():
        raise SettingsError(f"--resume found no run in {out}; leave it out to start one")
    network, task = _open(
        model, weights, data, preparing_of(mean, std, image_size, interpolation, crop), columns, on_bad_image,
        validate, seed, quiet,
    )  # fmt: skip
    if not quiet and sources.is_untrained(model, weights):
        print(f"warning: {model} starts from random numbers; --weights gives it trained ones", file=sys.stderr)
    run = job.compress(
        network, task, steps, out=out, runtimes=runtimes, threads=threads, batch=batch, max_drop=max_drop,
        target=target, command=_command(), names={"model": model, "data": data},
    )  # fmt: skip
    finish(run, json_)


@app.command()
def plan(
    model: Model,
    data: Annotated[str, typer.Option(help="digits, parquet:DIR, folder:DIR, hf:NAME (downloads) or random:3x224x224")],
    weights: Weights = None,
    recipe: RecipeFile = None,
    latency: Latency = None,
    bytes_: Bytes = None,
    macs: Macs = None,
    memory: Memory = None,
    max_drop: Annotated[float | None, typer.Option(hidden=True)] = None,
    runtime: Runtime = "onnxruntime",
    threads: Threads = 1,
    batch: Batch = 1,
    out: Annotated[Path | None, typer.Option(hidden=True)] = None,
    resume: Annotated[bool, typer.Option("--resume", hidden=True)] = False,
    seed: Seed = 0,
    epochs: Epochs = 6,
    table: TableFile = None,
    resolutions: Resolutions = None,
    device: Device = "auto",
    max_hours: MaxHours = None,
    validate: Validate = None,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    interpolation: Interpolation = None,
    crop: Crop = None,
    columns: Columns = None,
    on_bad_image: OnBadImage = "stop",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """The dry run of compress: shapes, sizes and times, no training. Exports each step's model and times it in the real
    runtime; takes the options of compress."""
    from tersenet.dry_run import dry_run, dry_run_table
    from tersenet.ship import check_runtimes
    from tersenet.targets import Target, recipe_of

    # The hidden options do nothing here; they let a compress command be planned as it stands.
    target, runtimes = Target(latency, bytes_, macs, memory), names_in(runtime)
    check_runtimes(runtimes, threads)
    steps = recipe_of(
        recipe, target, epochs=epochs, data=data, runtime=runtimes[0], threads=threads, batch=batch, table=table,
        device=device, max_hours=max_hours, resolutions=names_in(resolutions or ""),
    )  # fmt: skip
    network, task = _open(
        model, weights, data, preparing_of(mean, std, image_size, interpolation, crop), columns, on_bad_image,
        validate, seed, quiet,
    )  # fmt: skip
    found = dry_run(network, task, steps, runtimes=runtimes, threads=threads, batch=batch, target=target)
    show(found, json_, lambda: dry_run_table(found))
    if not found["met"]:
        raise typer.Exit(1)


@app.command()
def measure(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help=".onnx, .xml, .pt2, .terse, .tflite or .pte", show_default=False),
    ],
    data: Data = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="onnxruntime, openvino, pytorch, pytorch-compiled, litert or executorch; several with commas "
            "(default: each file's)"
        ),
    ] = None,
    threads: Threads = 1,
    batch: Batch = 1,
    turns: Annotated[int, typer.Option(min=20, help="turns that the files take, in shuffled order")] = 20,
    cold: Annotated[bool, typer.Option("--cold", help="alternate single calls, caches cold")] = False,
    openings: Annotated[
        int, typer.Option(min=1, help="share the turns out over so many openings of the files, in new processes")
    ] = 1,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    interpolation: Interpolation = None,
    crop: Crop = None,
    columns: Columns = None,
    on_bad_image: OnBadImage = "stop",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Times files against each other in their runtimes. Each has its own process; they take turns, and each figure has
    an interval. With --data the files are scored there too."""
    from tersenet.files import measure_files, measure_table

    found = measure_files(
        files, None if runtime is None else names_in(runtime), data, threads=threads, batch=batch, turns=turns,
        cold=cold, openings=openings, columns=pair_of(columns), on_bad_image=on_bad_image,
        preparing=preparing_of(mean, std, image_size, interpolation, crop), quiet=quiet,
    )  # fmt: skip
    show(found, json_, lambda: measure_table(found))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN|FILE.terse|FILE.onnx", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            help="onnx, openvino, tensorrt, torch, terse, litert, litert-fp16 or executorch; several with commas"
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="the folder to write to (default: beside the source)")] = None,
    image_size: ImageSize = None,
    json_: Json = False,
) -> None:
    """Writes a compressed model for other runtimes. Each file is checked against PyTorch; the model may also be that of
    a float .onnx file."""
    from tersenet.files import export_to

    found = export_to(source, names_in(to), out, preparing_of(size=image_size).size)
    show(found, json_, lambda: "\n".join(file_line(name, value) for name, value in found.items()))


@app.command()
def pack(
    source: Annotated[str, typer.Argument(metavar="RUN|MODEL", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.terse")],
    weights: Weights = None,
    data: Annotated[str | None, typer.Option(help="images to choose by, and a test set to score on")] = None,
    max_drop: Annotated[float | None, typer.Option(help="as small as so many points of score lost allow")] = None,
    bytes_: Annotated[str | None, typer.Option("--bytes", help="0.08x of the float32 weights, or 90000")] = None,
    seed: Seed = 0,
    validate: Validate = None,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    interpolation: Interpolation = None,
    crop: Crop = None,
    columns: Columns = None,
    on_bad_image: OnBadImage = "stop",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Writes one compressed file that loads without the model's class. With --max-drop or --bytes weights are rounded,
    by what they cost in the file and what they hurt, without training; else the file is lossless."""
    from tersenet.files import pack as pack_source
    from tersenet.report.words import both_ways

    if max_drop is None and bytes_ is None:
        found = pack_source(source, output, weights, preparing_of(size=image_size).size)
        show(
            found,
            json_,
            lambda: (
                f"{output}: {found['bytes']:,} bytes; its float32 weights have {found['float32_bytes']:,} "
                f"({both_ways(found['float32_bytes'], found['bytes'])})"
            ),
        )
        return
    from tersenet.packing import check_budget, pack_within, said

    check_budget(output, data is not None, max_drop, bytes_)
    if Path(source).is_dir():
        from tersenet.run import Run

        source = str(Run(source).file("model.terse"))
    network, task = _open(
        source, weights, data, preparing_of(mean, std, image_size, interpolation, crop), columns, on_bad_image,
        validate, seed, quiet,
    )  # fmt: skip
    found = pack_within(network, task, output, max_drop=max_drop, bytes=bytes_)
    show(found, json_, lambda: said(found))
    if not found["met"]:
        raise typer.Exit(1)


@app.command()
def unpack(
    source: Annotated[Path, typer.Argument(metavar="FILE.terse", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="MODEL.pt2, MODEL.onnx or MODEL.safetensors")],
    json_: Json = False,
) -> None:
    """Turns a .terse file into a .pt2, .onnx or .safetensors file."""
    from tersenet.deploy.artifact import unpack as unpack_file

    found = {"file": str(output), "bytes": unpack_file(source, output).stat().st_size}
    show(found, json_, lambda: file_line(str(output), found))


@app.command()
def predict(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="any of our files", show_default=False)],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", show_default=False)],
    runtime: Annotated[str | None, typer.Option(help="default: the one that the file is for")] = None,
    top: Annotated[int, typer.Option(min=1, help="how many labels to show")] = 3,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    interpolation: Interpolation = None,
    crop: Crop = None,
    json_: Json = False,
) -> None:
    """Labels of images, from a file in its runtime."""
    from tersenet.predict import predict_images

    found = predict_images(file, images, runtime, top, preparing_of(mean, std, image_size, interpolation, crop))
    show(
        found,
        json_,
        lambda: "\n".join(
            f"{name}: " + ", ".join(f"{guess['label']} {100 * guess['probability']:.1f} %" for guess in guesses)
            for name, guesses in found.items()
        ),
    )


@app.command()
def check(
    source: Annotated[Path, typer.Argument(metavar="RUN|FILE", show_default=False)],
    max_drop: MaxDrop = None,
    max_latency: Annotated[str | None, typer.Option(help="such as 3ms, or 0.5x of the original's")] = None,
    max_bytes: Annotated[str | None, typer.Option(help="such as 300000, or 0.1x of the original's")] = None,
    runtime: Annotated[str | None, typer.Option(help="default: the run's first, or the file's own")] = None,
    fused: Annotated[
        bool, typer.Option("--fused", help="the runtime may leave nothing in float between integer operators")
    ] = False,
    json_: Json = False,
) -> None:
    """A gate for continuous integration. Exit code 1 when a run, as reported, or a file, measured now, misses one of
    these limits."""
    from tersenet.gate import gate, gate_text

    found = gate(source, max_drop=max_drop, max_latency=max_latency, max_bytes=max_bytes, runtime=runtime,
                 fused=fused)  # fmt: skip
    show(found, json_, lambda: gate_text(found))
    if not found["met"]:
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="the page to write")] = Path("report.html"),
    json_: Json = False,
) -> None:
    """One self-contained HTML page of one or several runs."""
    from tersenet.report.page import write_html
    from tersenet.run import Run

    write_html([Run(folder).report for folder in runs], output, runs)
    show({"file": str(output), "runs": [str(folder) for folder in runs]}, json_, lambda: f"wrote {output}")


@app.command()
def table(
    model: Model,
    out: Annotated[Path, typer.Option(help="the table to write, such as device.json")],
    weights: Weights = None,
    data: Data = None,
    runtime: Annotated[str, typer.Option(help="onnxruntime or openvino")] = "onnxruntime",
    threads: Threads = 1,
    batch: Batch = 1,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fills a latency table for a model on this device. compress --table uses it elsewhere, so that a search on a big
    machine aims at the latency of a small one."""
    from tersenet.tables import fill_table, table_lines

    network, task = _open(model, weights, data, preparing_of(mean, std, image_size), quiet=quiet)
    found = fill_table(network, task, out, runtime, threads, batch)
    show(found, json_, lambda: table_lines(found))


@app.command()
def methods(json_: Json = False) -> None:
    """Every step, with what it serves and needs, and its settings."""
    from tersenet.methods import known_methods, methods_list

    found = known_methods()
    show({"methods": found}, json_, lambda: methods_list(found))


@app.command()
def doctor(
    threads: Threads = 1,
    quick: Annotated[bool, typer.Option("--quick", help="do not measure the peak and the bandwidth")] = False,
    json_: Json = False,
) -> None:
    """What is installed, what this processor can do, what is missing. Measures its peak and its bandwidth too."""
    from tersenet.deploy.causes import figures
    from tersenet.deploy.machine import doctor as examine
    from tersenet.deploy.machine import doctor_table
    from tersenet.deploy.roofline import roofline

    found = examine()
    if not quick:
        found["roofline"] = figures(roofline(threads, again=True, say=say))
    show(found, json_, lambda: doctor_table(found))


def _open(
    model: str,
    weights: Path | None,
    data: str | None,
    preparing: Preparing,
    columns: str | None = None,
    on_bad_image: str = "stop",
    validate: str | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> tuple[nn.Module, Task]:
    """The model and its task, from what was typed."""
    from tersenet import sources
    from tersenet.task import Task

    network, preparation = sources.open_model(model, weights, seed, preparing.size)
    preparation = preparing.applied(preparation)
    if data is None:
        return network, Task(
            example=sources.example_of(preparation), original=network, preparation=preparation, quiet=quiet
        )
    if on_bad_image not in ("skip", "stop"):
        raise SettingsError(f"--on-bad-image is {on_bad_image!r}; allowed: skip, stop")
    return network, sources.open_task(
        network,
        preparation,
        data,
        validate=validate,
        seed=seed,
        columns=pair_of(columns),
        on_bad_image=on_bad_image,
        quiet=quiet,
    )


def _command() -> str:
    import shlex

    return shlex.join(["tersenet", *sys.argv[1:]])
