"""The proof of a run: every row's files written, checked, scored and timed in one run; then the report.

Costs are those of what ships, with masks and rounding made permanent.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from tersenet.deploy.checked import checked
from tersenet.deploy.decomposed import rounds_activations
from tersenet.deploy.machine import machine
from tersenet.deploy.pt2 import export_pt2
from tersenet.deploy.timings import Measurement
from tersenet.graph.costs import costs, totals
from tersenet.prune.worth import table, worth
from tersenet.report.card import write_card
from tersenet.report.page import write_html
from tersenet.report.report import new_report, row, target, write_json
from tersenet.run import Journal
from tersenet.ship import (
    READS,
    Shipped,
    describe_file,
    peaks,
    preparation_dict,
    ship,
    slower_in_integers,
    time_files,
)
from tersenet.size import stages
from tersenet.targets import Target, judged, missed_digits
from tersenet.task import Score, Task, score_model

# A share of zeros that nobody pruned for: of weights that rounding, or chance, made zero.
_FEW = 0.02


def prove(
    journal: Journal,
    original: nn.Module,
    task: Task,
    settings: dict[str, Any],
    wanted: Target,
    command: str | None,
    say: Callable[..., None],
) -> None:
    """Exports every row's model, scores and times the files in one run, and writes the report last.

    Args:
        journal: a run whose steps are all done.
        settings: as asked for; "runtimes", "threads" and "batch" say what is measured.
        wanted: what the last row is held against.
        command: what was typed, for the report.
        say: prints progress.
    """
    folder, runtimes = journal.folder, settings["runtimes"]
    names = ["original", *(f"{entry.index}. {entry.name}" for entry in journal.entries)]
    tasks = {name: journal.task_after(task, count) for count, name in enumerate(names)}
    shipped = {}
    for count, name in enumerate(names):
        say(f"files of {name}")
        stem = f"{count:02d}-{'original' if count == 0 else journal.entries[count - 1].name}"
        replayed = journal.replay(original, count)
        if count == len(names) - 1:
            settings = {**settings, **_zeros(replayed), **_stages(journal, original, tasks[name], say)}
        shipped[name] = ship(replayed, tasks[name], folder / "files", stem, runtimes)
    latencies = {}
    for runtime in runtimes:
        say(f"timing {len(names)} files in {runtime}")
        files = {name: (shipped[name].files[READS[runtime]], tasks[name]) for name in names}
        latencies[runtime] = time_files(
            files, runtime, threads=settings["threads"], batch=settings["batch"], quiet=task.quiet
        )
    rows = [
        _row(name, shipped[name], journal.entries[index - 1].row if index else {}, latencies, tasks[name], names[0])
        for index, name in enumerate(names)
    ]
    task = tasks[names[-1]]
    report = new_report(
        machine=machine(),
        settings=settings,
        rows=rows,
        files=_final_files(folder, shipped[names[-1]], task, runtimes),
        recipe=journal.identity["recipe"],
        commands=[command] if command else [],
        targets=[*judged(wanted, rows, runtimes[0]), *_drop(rows, settings)],
        preparation=preparation_dict(task),
        warnings=[note for name in names for note in shipped[name].notes]
        + [note for before, name in pairwise(names) for note in _slower(shipped, latencies, name, before)],
    )
    (folder / "recipe.yaml").write_text(journal.identity["recipe"], encoding="utf-8")
    write_card(report, folder / "README.md")
    write_html([report], folder / "report.html")
    write_json(report, folder / "report.json")


def _slower(shipped: dict[str, Shipped], latencies: dict[str, Measurement], name: str, before: str) -> list[str]:
    """What is said where a step made integers of floats, and time was lost by it."""
    if not rounds_activations(shipped[name].model) or rounds_activations(shipped[before].model):
        return []
    return slower_in_integers(latencies, name, before)


def _zeros(model: nn.Module) -> dict[str, Any]:
    """What the zeros in the weights of the model that ships are worth, where there are more than chance makes."""
    rows = worth(model)
    if not rows or rows[-1].sparsity < _FEW:
        return {}
    return {"zeros": {"said": table(rows), "rows": [{**asdict(row), "buys": row.buys} for row in rows]}}


def _stages(journal: Journal, original: nn.Module, task: Task, say: Callable[..., None]) -> dict[str, Any]:
    """Bytes stage by stage where the run shared values: before it did, and where they were trained last."""
    names = [entry.name for entry in journal.entries]
    if "share_weights" not in names:
        return {}
    first = names.index("share_weights")
    last = first + 1
    while last < len(names) and names[last] == "train":
        last += 1
    say("bytes stage by stage")
    rows = stages.stages(journal.replay(original, first), journal.replay(original, last), task)
    return {"stages": {"said": stages.table(rows), "rows": stages.as_dicts(rows)}}


def _row(
    name: str, shipped: Shipped, recorded: dict[str, Any], latencies: dict[str, Measurement], task: Task, original: str
) -> dict[str, Any]:
    """The report row of one model.

    Args:
        recorded: what the journal holds of the step; empty for the original.
        original: the name of the first row, which the others are timed against.
    """
    model, scores = shipped.model, shipped.scores
    first: Score | None = next(iter(scores.values()), None)
    by_runtime = {key: value.value for key, value in scores.items()}
    if task.test is not None:
        pytorch = recorded["score"] if recorded else score_model(model, task, task.test).value
        by_runtime = {"pytorch": pytorch, **by_runtime}
    cost = totals(model, task.example)
    latency: dict[str, dict[str, Any]] = {}
    for runtime, found in latencies.items():
        latency[runtime] = found.latency(name)
        if name != original:
            ratio = found.ratio(name, original)
            latency[runtime]["left_interval"] = [ratio.low, ratio.high]
    return row(
        name,
        score=None if first is None else first.value,
        score_interval=None if first is None else (first.low, first.high),
        scores=None if first is None else by_runtime,
        top5=None if first is None else first.top5,
        samples=None if first is None else first.samples,
        params=cost.params,
        macs=cost.macs,
        param_bytes=cost.param_bytes,
        file_bytes=shipped.file_bytes,
        latency_ms=latency,
        peak_bytes=peaks(latencies, name),
        layers=[
            {
                "path": layer.path,
                "kind": layer.kind,
                "params": layer.params,
                "macs": layer.macs,
                "bytes": layer.param_bytes,
            }
            for layer in costs(model, task.example)
        ],
        left_alone=recorded.get("left_alone"),
        seconds=recorded.get("seconds"),
    )


def _final_files(folder: Path, shipped: Shipped, task: Task, runtimes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Puts what ships into the run folder, and describes it for the report."""

    found = {}
    for kind, source in shipped.files.items():
        path = folder / f"model.{kind}"
        shutil.copyfile(source, path)
        runtime = next((name for name in runtimes if READS[name] == kind), None)
        if kind == "terse":
            found[path.name] = describe_file(path, None, shipped.agreements["terse"], "pytorch")
        else:
            found[path.name] = describe_file(
                path, shipped.scores.get(runtime or ""), shipped.agreements.get(runtime or ""), runtime
            )
    if "pt2" not in shipped.files:
        path = export_pt2(shipped.model, task.example, folder / "model.pt2", task.preparation.metadata())
        assert shipped.reference is not None
        agreement = checked(path, ["pytorch"], shipped.reference)["pytorch"]
        found[path.name] = describe_file(path, None, agreement, "pytorch")
    return found


def _drop(rows: list[dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The loss that was allowed, and what became of it."""
    if settings["max_drop"] is None:
        return []
    drop = round(100 * (rows[0]["score"] - rows[-1]["score"]), 9)  # 100 * (0.9339 - 0.9289) is above 0.5
    said = f"{missed_digits(drop, settings['max_drop'], 2)} points"
    return [target("drop", f"{settings['max_drop']:g} points", said, drop <= settings["max_drop"])]
