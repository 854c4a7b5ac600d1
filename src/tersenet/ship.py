"""From a model in memory to files that ship: written, checked against PyTorch, scored and timed in their runtimes."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from tersenet.bricks.few_bits import FewBitLayer
from tersenet.bricks.settle import settle
from tersenet.deploy import graph_json
from tersenet.deploy.apart import Entry, measure_apart
from tersenet.deploy.artifact import save_terse
from tersenet.deploy.checked import CHECKED, checked
from tersenet.deploy.decomposed import rounds_activations
from tersenet.deploy.left_in_float import READERS, left_in_float
from tersenet.deploy.machine import usable_cores
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.pt2 import export_pt2
from tersenet.deploy.reference import Reference
from tersenet.deploy.runner import as_array
from tersenet.deploy.runtimes import RUNTIMES, open_file
from tersenet.deploy.timings import Measurement
from tersenet.deploy.verify import Agreement, score_file
from tersenet.errors import ExportError, SettingsError, TraceError, require
from tersenet.graph.outputs import return_flat
from tersenet.graph.trace import trace
from tersenet.report.headline import SLACK
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.task import Score, Task, inputs_of

# Instructions that multiply 8-bit integers and add the products, as the processor names them.
_INTEGER_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8", "dotprod", "i8mm"}
# What each runtime reads.
READS = {"onnxruntime": "onnx", "openvino": "onnx", "pytorch": "pt2"}


@dataclass
class Shipped:
    """One model as files.

    Args:
        model: what is in the files: masks and rounding made permanent, so that an int8 model holds int8.
        files: by format ("onnx", "terse", "pt2"), those that could be written.
        not_written: by format, why a file could not be.
        scores: of the file in each runtime.
        agreements: with the model, per runtime; that of the .terse file as "terse".
        notes: what a reader of the report should know.
        reference: what the files were compared with.
    """

    model: nn.Module
    files: dict[str, Path]
    scores: dict[str, Score] = field(default_factory=dict)
    agreements: dict[str, Agreement] = field(default_factory=dict)
    not_written: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    reference: Reference | None = field(default=None, repr=False)

    @property
    def file_bytes(self) -> dict[str, int]:
        return {kind: path.stat().st_size for kind, path in self.files.items()}


def check_runtimes(runtimes: Sequence[str], threads: int = 1) -> None:
    """Raises SettingsError on an unknown runtime, on none, or on more threads than there are cores."""
    if threads > usable_cores():
        raise SettingsError(f"threads is {threads}, and this process may use {usable_cores()} cores; ask for no more")
    if not runtimes:
        raise SettingsError(f"no runtime was named; name one of {', '.join(READS)}")
    for runtime in runtimes:
        if runtime not in READS:
            raise SettingsError(f"unknown runtime {runtime!r} (known: {', '.join(READS)})")
        used = RUNTIMES[runtime]
        if used.extra is not None:
            require(used.package, used.extra, f"run files in {runtime}")


def ship(model: nn.Module, task: Task, folder: Path, stem: str, runtimes: Sequence[str]) -> Shipped:
    """Writes a model's .terse and what its runtimes read, checks each against PyTorch, and scores it there.

    Files are independent: one that cannot be written is noted, and the others are there.

    Raises:
        ExportError: when the file of the first runtime cannot be written, or a file does not agree with the model; it
            is removed then. Also when the model's outputs hold NaN.
    """
    formats = dict.fromkeys(READS[runtime] for runtime in runtimes)
    model = copy.deepcopy(model)
    if any(isinstance(module, FewBitLayer) for module in model.modules()):
        # Settled layers of few values are whole numbers, into which no norm can be folded any more.
        fold = FoldBatchNorm()
        model = fold.apply(model, fold.plan(model, task))
    model = settle(model)
    reference = Reference(model, task.example, inputs(task), task.seed)
    reference.check_values(strict=True)
    shipped = Shipped(model, {}, reference=reference)
    for kind in ("terse", *formats):
        served = [runtime for runtime in runtimes if READS[runtime] == kind]
        write_into(shipped, task, kind, folder / f"{stem}.{kind}", served)
    if (scored := READS[runtimes[0]]) not in shipped.files:
        raise ExportError(
            f"the .{scored} file, which {runtimes[0]} reads, cannot be had: {shipped.not_written[scored]}"
        )
    for runtime in runtimes:
        if READS[runtime] not in shipped.files:
            continue
        runner = open_file(shipped.files[READS[runtime]], runtime, threads=2)
        if task.test is not None:
            shipped.scores[runtime] = found = score_file(runner, task, task.test)
            if found.without_value:
                shipped.notes.append(f"{stem} in {runtime}: {found.nan_text}")
        if rounds_activations(model) and runtime in READERS:
            left = left_in_float(shipped.files[READS[runtime]], runtime)
            if left:
                shipped.notes.append(left_note(runtime, left))
    return shipped


def write_into(shipped: Shipped, task: Task, kind: str, path: Path, runtimes: Sequence[str]) -> None:
    """Writes one file of a model that ships; where it cannot be written, why is kept and noted.

    Args:
        runtimes: those that read it and in which it is held to the model; a .terse file is so in PyTorch.
    Raises:
        ExportError: when the file does not agree with the model; it is removed then.
    """
    try:
        if kind == "terse":
            save_terse(shipped.model, task.example, path, task.preparation)
        elif kind == "onnx":
            _write_onnx(shipped, task, path, runtimes)
        else:
            export_pt2(shipped.model, task.example, path, task.preparation.metadata())
    except (ExportError, TraceError) as error:
        shipped.not_written[kind] = str(error)
        shipped.notes.append(f"no .{kind} file: {error}")
        return
    shipped.files[kind] = path
    assert shipped.reference is not None
    if kind == "terse":
        shipped.agreements["terse"] = checked(path, ["pytorch"], shipped.reference)["pytorch"]
    else:
        found = checked(
            path, runtimes, shipped.reference, functools.partial(_write_onnx, shipped, task, path, runtimes)
        )
        shipped.agreements |= found
        shipped.notes += [
            f"{runtime} computes {', '.join(each.in_float)} wrong in integers, so the file leaves that in float"
            for runtime, each in found.items()
            if each.in_float
        ]


def _write_onnx(shipped: Shipped, task: Task, path: Path, runtimes: Sequence[str], floats: Sequence[str] = ()) -> None:
    """Writes an ONNX file that names the runtimes in which it is checked; of an int8 model with some operators in
    float."""
    said = {CHECKED: ",".join(runtimes)}
    export_onnx(shipped.model, task.example, path, task.preparation, said, floats=floats)


def foresee_files(model: nn.Module, task: Task) -> list[str]:
    """What can be known of a model's files before anything is done, in about the time of one capture.

    Returns:
        sentences on files that cannot be written, where others can.
    Raises:
        TraceError: when the forward cannot be captured, so that there would be no file at all.
    """
    graph = trace(settle(copy.deepcopy(model)).eval(), task.example)
    try:
        return_flat(graph)
        graph_json.to_json(graph)
    except ExportError as error:
        return [f"there will be no .terse file: {error}"]
    return []


def left_note(runtime: str, left: Sequence[str]) -> str:
    """That a runtime leaves operators of an int8 file in float, which, and what to do."""
    shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
    return (
        f"{runtime} leaves {len(left)} operator{'s' if len(left) > 1 else ''} of the int8 file in float: {shown}; "
        "use a ReLU there, or skip the layers beside them"
    )


def slower_in_integers(timed: Mapping[str, Measurement], name: str, before: str) -> list[str]:
    """Where an int8 model is surely slower than the float one that it was made of, beyond the slack; one sentence each.

    Args:
        timed: runtime -> the measurement that both took part in.
        name, before: of the int8 model and of the one before it, there.
    """
    said = []
    for runtime, found in timed.items():
        ratio = found.ratio(name, before)
        if ratio.low > SLACK:
            flags = set(found.machine.get("flags", ()))
            why = "" if flags & _INTEGER_FLAGS else ": this processor has no instructions for int8 products (VNNI)"
            said.append(
                f"int8 is {ratio.ratio:.2f}x slower than float in {runtime} on this machine{why}; ship the model "
                "before it, or quantize the weights alone (activations: null) for a smaller file"
            )
    return said


def inputs(task: Task) -> Iterable[Any]:
    """Real inputs to compare on: calibration data where there is some, else the example."""
    if task.calibrate is None and task.train is None:
        return [(task.example, None)]
    return task.calibration(256)


def time_files(
    files: Mapping[str, tuple[Path, Task]],
    runtime: str,
    *,
    threads: int,
    batch: int,
    turns: int = 20,
    quiet: bool = False,
) -> Measurement:
    """Times files against each other in one runtime, each in its own process, on one real input of its task.

    Raises:
        SettingsError: on more threads than cores.
    """
    entries = []
    for name, (path, task) in files.items():
        given = inputs_of(next(iter(inputs(task))))
        arrays = tuple(as_array(x[:1].repeat(batch, *[1] * (x.dim() - 1))) for x in given)
        entries.append(Entry(name, path, runtime, arrays if len(arrays) > 1 else arrays[0]))
    return measure_apart(entries, turns=turns, batch=batch, threads=threads, progress=not quiet, energy=False)


def peaks(timed: Mapping[str, Measurement], name: str) -> dict[str, int]:
    """runtime -> bytes of memory at the peak of one file; runtimes where it was not measured are left out."""
    found = {runtime: each.peak_bytes(name) for runtime, each in timed.items()}
    return {runtime: value for runtime, value in found.items() if value is not None}


def describe_file(path: Path, score: Score | None, agreement: Agreement | None, runtime: str | None) -> dict[str, Any]:
    """A file's entry in the report."""
    entry: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    if runtime is not None:
        entry["runtime"] = runtime
    if score is not None:
        entry["score"] = score.value
    if agreement is not None:
        entry |= agreement.to_json()
    return entry


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def preparation_dict(task: Task) -> dict[str, Any]:
    """How an image becomes an input; where nothing says it, or the model takes something else, its inputs: shapes of
    one sample, types."""
    given = inputs_of((task.example, None))
    shapes = [[*x.shape[1:]] for x in given]
    is_image = shapes == [[task.preparation.channels, *task.preparation.size]] and given[0].is_floating_point()
    if is_image and not task.preparation.is_of_data:
        return task.preparation.to_json()
    dtypes = [str(x.dtype).removeprefix("torch.") for x in given]
    listed = [{"shape": shape, "dtype": dtype} for shape, dtype in zip(shapes, dtypes, strict=True)]
    return {"labels": list(task.preparation.labels), "inputs": listed}
