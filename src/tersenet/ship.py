"""From a model in memory to files that ship: written, checked against PyTorch, scored and timed in their runtimes."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from tersenet.bricks.few_bits import FewBitLayer
from tersenet.bricks.settle import settle
from tersenet.deploy.apart import Entry, measure_apart
from tersenet.deploy.artifact import save_terse
from tersenet.deploy.checked import checked
from tersenet.deploy.decomposed import rounds_activations
from tersenet.deploy.left_in_float import READERS, left_in_float
from tersenet.deploy.machine import usable_cores
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.pt2 import export_pt2
from tersenet.deploy.reference import Reference
from tersenet.deploy.runtimes import RUNTIMES, open_file
from tersenet.deploy.timings import Measurement
from tersenet.deploy.verify import Agreement, score_file
from tersenet.errors import SettingsError, require
from tersenet.report.headline import SLACK
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.task import Score, Task, batch_input

# Instructions that multiply 8-bit integers and add the products, as the processor names them.
_INTEGER_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8", "dotprod", "i8mm"}
# What each runtime reads.
READS = {"onnxruntime": "onnx", "openvino": "onnx", "pytorch": "pt2"}


@dataclass
class Shipped:
    """One model as files.

    Args:
        model: what is in the files: masks and rounding made permanent, so that an int8 model holds int8.
        files: by format ("onnx", "terse", "pt2").
        scores: of the file in each runtime.
        agreements: with the model, per runtime; that of the .terse file as "terse".
        notes: what a reader of the report should know.
        reference: what the files were compared with.
    """

    model: nn.Module
    files: dict[str, Path]
    scores: dict[str, Score] = field(default_factory=dict)
    agreements: dict[str, Agreement] = field(default_factory=dict)
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

    Raises:
        ExportError: when a file cannot be written, or does not agree with the model; it is removed then.
    """
    formats = dict.fromkeys(READS[runtime] for runtime in runtimes)
    model = copy.deepcopy(model)
    if any(isinstance(module, FewBitLayer) for module in model.modules()):
        # Settled layers of few values are whole numbers, into which no norm can be folded any more.
        fold = FoldBatchNorm()
        model = fold.apply(model, fold.plan(model, task))
    model = settle(model)
    reference = Reference(model, task.example, inputs(task), task.seed)
    terse = save_terse(model, task.example, folder / f"{stem}.terse", task.preparation)
    shipped = Shipped(model, {"terse": terse}, reference=reference)
    shipped.agreements["terse"] = checked(shipped.files["terse"], ["pytorch"], reference)["pytorch"]
    for kind in formats:
        path = folder / f"{stem}.{kind}"
        if kind == "onnx":
            export_onnx(model, task.example, path, task.preparation)
        else:
            export_pt2(model, task.example, path, task.preparation.metadata())
        shipped.files[kind] = path
        shipped.agreements |= checked(path, [runtime for runtime in runtimes if READS[runtime] == kind], reference)
    for runtime in runtimes:
        runner = open_file(shipped.files[READS[runtime]], runtime, threads=2)
        if task.test is not None:
            shipped.scores[runtime] = score_file(runner, task, task.test)
        if rounds_activations(model) and runtime in READERS:
            left = left_in_float(shipped.files[READS[runtime]], runtime)
            if left:
                shipped.notes.append(left_note(runtime, left))
    return shipped


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
        return [task.example]
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
        x = batch_input(next(iter(inputs(task))))
        array = x[:1].repeat(batch, *[1] * (x.dim() - 1)).float().numpy()
        entries.append(Entry(name, path, runtime, array))
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
    return {key: list(value) for key, value in asdict(task.preparation).items()}
