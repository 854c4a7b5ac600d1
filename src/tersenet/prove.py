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

from tersenet.deploy.decomposed import rounds_activations
from tersenet.deploy.machine import machine
from tersenet.deploy.timings import Measurement
from tersenet.errors import RecipeError
from tersenet.graph.agreement import compared_once
from tersenet.graph.costs import costs, totals
from tersenet.numerics.scale import Scale
from tersenet.pruning.worth import table, worth
from tersenet.recipe import Recipe
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
    write_into,
)
from tersenet.size import stages
from tersenet.targets import Target, judged, missed_digits
from tersenet.task import Score, Task, score_model

# A share of zeros that nobody pruned for: of weights that rounding, or chance, made zero.
_FEW = 0.02


@compared_once()
def prove(
    journal: Journal,
    original: nn.Module,
    task: Task,
    settings: dict[str, Any],
    wanted: Target,
    command: str | None,
    say: Callable[..., None],
    shipped: dict[str, Shipped],
    warnings: Sequence[str] = (),
) -> None:
    """Exports every row's model, scores and times the files in one run, and writes the report last.

    Args:
        journal: a run whose steps are all done.
        settings: as asked for; "runtimes", "threads" and "batch" say what is measured.
        wanted: what the last row is held against.
        command: what was typed, for the report.
        say: prints progress.
        shipped: rows whose files are there already, by their names.
        warnings: what was said already and belongs into the report.
    """
    folder, runtimes = journal.folder, settings["runtimes"]
    names = ["original", *(f"{entry.index}. {entry.name}" for entry in journal.entries)]
    tasks = {name: journal.task_after(task, count) for count, name in enumerate(names)}
    shipped = dict(shipped)
    for count, name in enumerate(names):
        stem = f"{count:02d}-{'original' if count == 0 else journal.entries[count - 1].name}"
        replayed = journal.replay(original, count)
        if count == len(names) - 1:
            settings = {**settings, **_zeros(replayed), **_stages(journal, original, tasks[name], say)}
        before = names[count - 1]
        same = name not in shipped and count > 0 and before in shipped and tasks[name] is tasks[before]
        if same and journal.left_as_it_was(original, count):
            say(f"files of {name}: those of {before}, for the step changed nothing")
            shipped[name] = shipped[before]
        if name not in shipped:
            say(f"files of {name}")
            shipped[name] = ship(replayed, tasks[name], folder / "files", stem, runtimes)
            say_not_written(shipped[name], say)
    latencies = _timed(shipped, tasks, settings, say)
    done = [{}, *(entry.row for entry in journal.entries)]
    rows = [
        _row(
            name, _timed_as(name, shipped), shipped[name], row, latencies, tasks[name], names[0], settings["scored_on"]
        )
        for name, row in zip(names, done, strict=True)
    ]
    task = tasks[names[-1]]
    files = _final_files(folder, shipped[names[-1]], task, runtimes)
    report = new_report(
        machine=machine(),
        settings=settings,
        rows=rows,
        files=files,
        not_written={f"model.{kind}": why for kind, why in shipped[names[-1]].not_written.items()},
        recipe=journal.identity["recipe"],
        brief_recipe=_brief(journal.identity["recipe"]),
        commands=[command] if command else [],
        targets=[*judged(wanted, rows, runtimes[0]), *_drop(rows, settings, task.scale)],
        metric=task.scale,
        preparation=preparation_dict(task),
        warnings=[*warnings]
        + [f"{entry.name}: {said}" for entry in journal.entries for said in entry.row.get("findings", [])]
        + list(dict.fromkeys(note for name in names for note in shipped[name].notes))
        + [note for before, name in pairwise(names) for note in _slower(shipped, latencies, name, before)],
    )
    (folder / "recipe.yaml").write_text(journal.identity["recipe"], encoding="utf-8")
    write_card(report, folder / "README.md")
    write_html([report], folder / "report.html")
    write_json(report, folder / "report.json")


def _brief(recipe: str) -> str | None:
    """The recipe with nothing but what differs from the defaults; None of steps that were made in Python."""
    try:
        return Recipe.parse(recipe).brief()
    except RecipeError:
        return None


def _timed(
    shipped: dict[str, Shipped], tasks: dict[str, Task], settings: dict[str, Any], say: Callable[..., None]
) -> dict[str, Measurement]:
    """Runtime -> the times of all files that it reads; runtimes that can read none are left out.

    A file that several rows have is timed once, under the name of the first of them (`_timed_as`).
    """
    found = {}
    for runtime in settings["runtimes"]:
        kind = READS[runtime]
        files = {
            name: (shipped[name].files[kind], own)
            for name, own in tasks.items()
            if kind in shipped[name].files and _timed_as(name, shipped) == name
        }
        if files:
            say(f"timing {len(files)} files in {runtime}")
            quiet = next(iter(tasks.values())).quiet
            found[runtime] = time_files(
                files, runtime, threads=settings["threads"], batch=settings["batch"], quiet=quiet
            )
    return found


def _timed_as(name: str, shipped: dict[str, Shipped]) -> str:
    """The first row that has the same files."""
    return next((other for other, each in shipped.items() if each is shipped[name]), name)


def say_not_written(shipped: Shipped, say: Callable[..., None]) -> None:
    """Says at once which files could not be written."""
    for kind, why in shipped.not_written.items():
        say(f"    no .{kind} file: {why}", markup=False)


def _slower(shipped: dict[str, Shipped], latencies: dict[str, Measurement], name: str, before: str) -> list[str]:
    """What is said where a step made integers of floats, and time was lost by it."""
    if not rounds_activations(shipped[name].model) or rounds_activations(shipped[before].model):
        return []
    name, before = _timed_as(name, shipped), _timed_as(before, shipped)
    both = {runtime: found for runtime, found in latencies.items() if {name, before} <= found.names}
    return slower_in_integers(both, name, before)


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
    return {"stages": {"said": stages.table(rows, task.scale), "rows": stages.as_dicts(rows)}}


def _row(
    name: str,
    timed_as: str,
    shipped: Shipped,
    recorded: dict[str, Any],
    latencies: dict[str, Measurement],
    task: Task,
    original: str,
    basis: str | None,
) -> dict[str, Any]:
    """The report row of one model.

    Args:
        timed_as: the name of the row whose files these are.
        recorded: what the journal holds of the step; empty for the original.
        original: the name of the first row, which the others are timed against.
        basis: what scores rest on now.
    """
    model, scores = shipped.model, shipped.scores
    first: Score | None = next(iter(scores.values()), None)
    by_runtime = {key: value.value for key, value in scores.items()}
    if task.test is not None:
        # A step that was recorded with other test data is scored anew.
        known = recorded.get("score") if recorded.get("scored_on") == basis else None
        pytorch = score_model(model, task, task.test).value if known is None else known
        by_runtime = {"pytorch": pytorch, **by_runtime}
    cost = totals(model, task.example)
    latency: dict[str, dict[str, Any]] = {}
    for runtime, found in latencies.items():
        if READS[runtime] not in shipped.files:
            continue
        latency[runtime] = found.latency(timed_as)
        if timed_as != original and original in found.names:
            ratio = found.ratio(timed_as, original)
            latency[runtime]["left_interval"] = [ratio.low, ratio.high]
    return row(
        name,
        score=None if first is None else first.value,
        score_interval=None if first is None else first.interval,
        scores=None if first is None else by_runtime,
        top5=None if first is None else first.top5,
        samples=None if first is None else first.samples,
        params=cost.params,
        macs=cost.macs,
        param_bytes=cost.param_bytes,
        file_bytes=shipped.file_bytes,
        latency_ms=latency,
        peak_bytes=peaks(latencies, timed_as),
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
            found[path.name]["checked"] = [name for name in runtimes if READS[name] == kind]
    if "pt2" not in shipped.files and "pt2" not in shipped.not_written:
        write_into(shipped, task, "pt2", path := folder / "model.pt2", ["pytorch"])
        if "pt2" in shipped.files:
            found[path.name] = describe_file(path, None, shipped.agreements["pytorch"], "pytorch")
    return found


def _drop(rows: list[dict[str, Any]], settings: dict[str, Any], scale: Scale) -> list[dict[str, Any]]:
    """The loss that was allowed, and what became of it."""
    limit = settings["max_drop"]
    if limit is None:
        return []
    drop = round(scale.lost(rows[0]["score"], rows[-1]["score"]), 9)  # 100 * (0.9339 - 0.9289) is above 0.5
    shown = missed_digits(drop, limit, 2) if scale.is_share else f"{drop:.4g}"
    return [
        target("drop", f"{limit:g} {scale.loss_unit}".rstrip(), f"{shown} {scale.loss_unit}".rstrip(), drop <= limit)
    ]
