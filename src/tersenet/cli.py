"""The command line: parse, call, print. What a command does lives in the module that it imports.

Exit codes: 0 done; 1 a target was not met (the result is written and reported all the same); 2 wrong use or bad input,
said in one sentence. With --json, standard output holds one JSON object and nothing else.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersenet.errors import SettingsError, TersenetError

if TYPE_CHECKING:
    from torch import nn

    from tersenet.task import Task

app = typer.Typer(
    name="tersenet",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Makes trained neural networks smaller and faster, and proves it on the file that ships.",
)
_debug = False

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="a name (resnet56), timm:NAME, torchvision:NAME, package.module:factory, FILE.pt2 or FILE.terse",
        show_default=False,
    ),
]
Weights = Annotated[Path | None, typer.Option(help="weights: .safetensors, or .pt/.pth read without running code")]
Data = Annotated[
    str | None, typer.Option(help="digits, parquet:DIR, folder:DIR, hf:NAME (downloads) or random:3x224x224")
]
Validate = Annotated[str | None, typer.Option(help="a held-out set to choose by, in the form of --data")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="a YAML file with the steps")]
Macs = Annotated[str | None, typer.Option(help="target: this share of the multiply-adds, such as 0.5x")]
MaxDrop = Annotated[float | None, typer.Option(help="target: at most this many points of score lost")]
Runtime = Annotated[
    str, typer.Option(help="onnxruntime, openvino or pytorch; several with commas, the first one counts")
]
Threads = Annotated[int, typer.Option(min=1, help="threads of the runtime")]
Batch = Annotated[int, typer.Option(min=1, help="batch for latency")]
Out = Annotated[Path, typer.Option(help="the run folder")]
Seed = Annotated[int, typer.Option(help="of everything that draws at random")]
Epochs = Annotated[int, typer.Option(min=0, help="training epochs that a target may use")]
Mean = Annotated[str | None, typer.Option(help="per channel, such as 0.485,0.456,0.406 (default: the model's)")]
Std = Annotated[str | None, typer.Option(help="per channel (default: the model's)")]
ImageSize = Annotated[str | None, typer.Option(help="such as 224 or 180x240 (default: the model's)")]
Columns = Annotated[str | None, typer.Option(help="image and label column, such as img,label (default: found)")]
OnBadImage = Annotated[str, typer.Option(help="skip or stop at an image that cannot be read")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on standard output")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress on standard error")]


def main() -> None:
    """The entry point: runs a command and turns our errors into one sentence and exit code 2."""
    try:
        app()
    except TersenetError as error:
        if _debug:
            raise
        print(f"tersenet: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("tersenet: stopped; call again with the same --out to go on", file=sys.stderr)
        sys.exit(130)


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False) -> None:
    global _debug
    _debug = debug
    if not debug:
        # Third-party chatter; our own warning is shown as a sentence.
        warnings.simplefilter("ignore")
        from tersenet.errors import NoEffect

        warnings.simplefilter("always", NoEffect)
        warnings.showwarning = lambda message, category, *_, **__: print(f"warning: {message}", file=sys.stderr)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="the run folder")] = Path("runs/demo"),
    runtime: Runtime = "onnxruntime",
    seed: Seed = 0,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """The main job on built-in data: trains a small net on scikit-learn's digits, compresses, verifies, reports."""
    from tersenet.demo import run_demo

    _finish(run_demo(out, _names(runtime), seed=seed, quiet=quiet), json_)


@app.command()
def profile(
    model: Model,
    weights: Weights = None,
    data: Data = None,
    runtime: Annotated[str | None, typer.Option(help="time the layers in onnxruntime or pytorch")] = None,
    threads: Threads = 1,
    batch: Batch = 1,
    image_size: ImageSize = None,
    json_: Json = False,
) -> None:
    """Where time, bytes and multiply-adds go, per layer."""
    from tersenet.deploy.profile import profile_model, profile_table
    from tersenet.sources import example_of

    network, task = _open(model, weights, data, image_size=image_size, quiet=True)
    example = task.example if data else example_of(task.preparation)
    found = profile_model(network, example, runtime=runtime, threads=threads, batch=batch)
    _print(found, json_, lambda: profile_table(found))


@app.command()
def compress(
    model: Model,
    data: Annotated[str, typer.Option(help="digits, parquet:DIR, folder:DIR, hf:NAME (downloads) or random:3x224x224")],
    weights: Weights = None,
    recipe: RecipeFile = None,
    macs: Macs = None,
    max_drop: MaxDrop = None,
    runtime: Runtime = "onnxruntime",
    threads: Threads = 1,
    batch: Batch = 1,
    out: Out = Path("runs/compress"),
    resume: Annotated[bool, typer.Option(help="refuse to start anew: there must be a run to go on with")] = False,
    seed: Seed = 0,
    epochs: Epochs = 6,
    validate: Validate = None,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    columns: Columns = None,
    on_bad_image: OnBadImage = "stop",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Runs a recipe, or meets a target; writes files for real runtimes, checked, scored and measured, and a report."""
    from tersenet import job

    if resume and not (out / "run.json").exists():
        raise SettingsError(f"--resume found no run in {out}; leave it out to start one")
    network, task = _open(
        model, weights, data, validate, seed, mean, std, image_size, columns, on_bad_image, quiet
    )
    run = job.compress(
        network,
        task,
        job.recipe_of(recipe, macs, epochs),
        out=out,
        runtimes=_names(runtime),
        threads=threads,
        batch=batch,
        max_drop=max_drop,
        max_macs=job.share(macs),
        command=_command(),
        names={"model": model, "data": data},
    )
    _finish(run, json_)


@app.command()
def plan(
    model: Model,
    data: Annotated[str, typer.Option(help="digits, parquet:DIR, folder:DIR, hf:NAME (downloads) or random:3x224x224")],
    weights: Weights = None,
    recipe: RecipeFile = None,
    macs: Macs = None,
    runtime: Runtime = "onnxruntime",
    threads: Threads = 1,
    batch: Batch = 1,
    seed: Seed = 0,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    columns: Columns = None,
    on_bad_image: OnBadImage = "stop",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """The dry run: builds the shapes, exports and times them on the real runtime, without any training."""
    from tersenet.dry_run import dry_run, dry_run_table
    from tersenet.job import recipe_of

    network, task = _open(
        model, weights, data, None, seed, mean, std, image_size, columns, on_bad_image, quiet
    )
    found = dry_run(network, task, recipe_of(recipe, macs), runtimes=_names(runtime), threads=threads, batch=batch)
    _print(found, json_, lambda: dry_run_table(found))


@app.command()
def measure(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help=".onnx, .xml, .pt2 or .terse", show_default=False)
    ],
    data: Data = None,
    runtime: Runtime = "onnxruntime",
    threads: Threads = 1,
    batch: Batch = 1,
    turns: Annotated[int, typer.Option(min=20, help="turns that the files take, in shuffled order")] = 20,
    cold: Annotated[bool, typer.Option("--cold", help="alternate single calls, caches cold")] = False,
    columns: Columns = None,
    on_bad_image: OnBadImage = "stop",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Times files against each other in their runtimes, interleaved, with intervals; with --data, scores them there."""
    from tersenet.files import measure_files, measure_table

    found = measure_files(
        files, _names(runtime), data, threads=threads, batch=batch, turns=turns, cold=cold,
        columns=_pair(columns), on_bad_image=on_bad_image, quiet=quiet,
    )  # fmt: skip
    _print(found, json_, lambda: measure_table(found))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN|FILE.terse", show_default=False)],
    to: Annotated[str, typer.Option(help="onnx, openvino or torch; several with commas")],
    out: Annotated[Path | None, typer.Option(help="the folder to write to (default: beside the source)")] = None,
    json_: Json = False,
) -> None:
    """Writes a compressed model for other runtimes, each file checked against PyTorch."""
    from tersenet.files import export_to

    found = export_to(source, _names(to), out)
    _print(
        found,
        json_,
        lambda: "\n".join(f"{name}  largest error {value['max_abs_error']:.2g}" for name, value in found.items()),
    )


@app.command()
def pack(
    source: Annotated[str, typer.Argument(metavar="RUN|MODEL", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.terse")],
    weights: Weights = None,
    json_: Json = False,
) -> None:
    """Writes one compressed file that loads without the model's class."""
    from tersenet.files import pack as pack_source

    found = pack_source(source, output, weights)
    _print(
        found,
        json_,
        lambda: f"{output}: {found['bytes']:,} bytes, {found['ratio']:.2f}x smaller than its float32 weights",
    )


@app.command()
def unpack(
    source: Annotated[Path, typer.Argument(metavar="FILE.terse", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="MODEL.pt2 or MODEL.safetensors")],
    json_: Json = False,
) -> None:
    """Turns a .terse file into one that plain PyTorch reads."""
    from tersenet.deploy.artifact import unpack as unpack_file

    path = Path(unpack_file(source, output) or output)
    _print({"file": str(path), "bytes": path.stat().st_size}, json_, lambda: f"{path}: {path.stat().st_size:,} bytes")


@app.command()
def predict(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="any of our files", show_default=False)],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", show_default=False)],
    runtime: Annotated[str | None, typer.Option(help="default: the one that the file is for")] = None,
    top: Annotated[int, typer.Option(min=1, help="how many labels to show")] = 3,
    json_: Json = False,
) -> None:
    """Labels of images, from a file in its runtime."""
    from tersenet.predict import predict_images

    found = predict_images(file, images, runtime, top)
    _print(
        found,
        json_,
        lambda: "\n".join(
            f"{name}: " + ", ".join(f"{guess['label']} {100 * guess['probability']:.1f} %" for guess in guesses)
            for name, guesses in found.items()
        ),
    )


@app.command()
def check(
    run: Annotated[Path, typer.Argument(metavar="RUN", show_default=False)],
    max_drop: MaxDrop = None,
    max_latency: Annotated[str | None, typer.Option(help="such as 3ms, or 0.5x of the original's")] = None,
    max_bytes: Annotated[str | None, typer.Option(help="such as 300000, or 0.1x of the original's")] = None,
    runtime: Annotated[str | None, typer.Option(help="default: the run's first")] = None,
    json_: Json = False,
) -> None:
    """A gate for continuous integration: exit code 1 when a run misses one of these."""
    from tersenet.files import gate

    found = gate(run, max_drop, max_latency, max_bytes, runtime)
    _print(
        found,
        json_,
        lambda: "\n".join(
            f"{'met ' if t['met'] else 'MISSED'} {t['what']}: {t['got']} (wanted {t['wanted']})"
            for t in found["targets"]
        ),
    )
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

    write_html([Run(folder).report for folder in runs], output)
    _print({"file": str(output), "runs": [str(folder) for folder in runs]}, json_, lambda: f"wrote {output}")


@app.command()
def methods(json_: Json = False) -> None:
    """Every step: what it does, the layers it serves, the data it needs, its settings."""
    from tersenet.methods import known_methods, methods_table

    found = known_methods()
    _print({"methods": found}, json_, lambda: methods_table(found))


@app.command()
def doctor(json_: Json = False) -> None:
    """What is installed, what this processor can do, what is missing and how to get it."""
    from tersenet.deploy.machine import doctor as examine
    from tersenet.deploy.machine import doctor_table

    found = examine()
    _print(found, json_, lambda: doctor_table(found))


def _open(
    model: str,
    weights: Path | None,
    data: str | None,
    validate: str | None = None,
    seed: int = 0,
    mean: str | None = None,
    std: str | None = None,
    image_size: str | None = None,
    columns: str | None = None,
    on_bad_image: str = "stop",
    quiet: bool = False,
) -> tuple[nn.Module, Task]:
    """The model and its task, from what was typed."""
    from tersenet import sources
    from tersenet.task import Task

    network, preparation = sources.open_model(model, weights)
    preparation = sources.prepared(preparation, _floats("--mean", mean), _floats("--std", std), _size(image_size))
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
        columns=_pair(columns),
        on_bad_image=on_bad_image,
        quiet=quiet,
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _pair(columns: str | None) -> tuple[str, str] | None:
    if columns is None:
        return None
    names = _names(columns)
    if len(names) != 2:
        raise SettingsError(f"--columns is {columns!r}; give the image and the label column, such as img,label")
    return names[0], names[1]


def _floats(option: str, text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(f"{option} is {text!r}; give numbers with commas, one per channel") from None


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise SettingsError(f"--image-size is {text!r}; give a size such as 224, or height x width such as 180x240")
    return int(parts[0]), int(parts[-1])


def _command() -> str:
    import shlex

    return shlex.join(["tersenet", *sys.argv[1:]])


def _print(value: Any, as_json: bool, show: Any) -> None:
    if as_json:
        print(json.dumps(value))
    else:
        from rich.console import Console

        Console(highlight=False, soft_wrap=True).print(show())


def _finish(run: Any, as_json: bool) -> None:
    """Prints a finished run; exit code 1 when a target was missed."""
    from tersenet.report.terminal import table

    if as_json:
        print(json.dumps({"run": str(run.folder), **run.report}))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        console.print(table(run.report))
        for name, value in run.report["files"].items():
            error = value.get("max_abs_error")
            console.print(
                f"{name}: {value['bytes']:,} bytes"
                + ("" if error is None else f", largest error against PyTorch {error:.2g}")
            )
        console.print(f"\n{run.verdict}\nopen {run.folder / 'report.html'}")
    if not run.met:
        raise typer.Exit(1)
