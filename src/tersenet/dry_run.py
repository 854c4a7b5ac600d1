"""The dry run: what a recipe would give, built and timed on the real runtime before any training."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from tersenet.bricks.opened import copied, need_float32, unwrapped
from tersenet.deploy.decomposed import rounds_activations
from tersenet.deploy.machine import machine
from tersenet.deploy.timings import Measurement
from tersenet.findings import collecting
from tersenet.graph.costs import totals
from tersenet.graph.taken_apart import opened
from tersenet.inputs_said import say_inputs
from tersenet.left_alone import listening
from tersenet.named import foresee_names, remembering
from tersenet.recipe import Recipe
from tersenet.repeat import Repeat
from tersenet.report.terminal import notes
from tersenet.report.words import bytes_text, count_text, milliseconds_text, percent
from tersenet.search.search import Search
from tersenet.ship import READS, Shipped, check_runtimes, foresee_files, peaks, ship, slower_in_integers, time_files
from tersenet.step import Chain, Step
from tersenet.targets import NO_TARGET, Target, aim_of, judged, searched
from tersenet.task import Task

if TYPE_CHECKING:
    from rich.console import Group


def without_training(step: Step) -> Step | None:
    """The step with everything that trains taken out of it; None when nothing is left. Of a repetition one round is
    left, since without training no round shows how many there will be."""
    if isinstance(step, Repeat):
        return without_training(Chain(steps=step.steps))
    if isinstance(step, Chain | Search):
        inner = tuple(kept for kept in map(without_training, step.steps) if kept is not None)
        return dataclasses.replace(step, steps=inner) if inner else None
    return None if step.family == "train" else step


def dry_run(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    runtimes: Sequence[str] = ("onnxruntime",),
    threads: int = 1,
    batch: int = 1,
    target: Target = NO_TARGET,
) -> dict[str, Any]:
    """Shapes, file sizes and measured latency after each step, without training; says which change does not pay.

    Returns:
        {"machine": ..., "rows": [{"step", "params", "macs", "file_bytes", "latency_ms": {runtime: {...}}, "peak_bytes":
        {runtime: bytes}, "notes"}], "foreseen": on files that cannot be written,
        "left_out": names of the steps that train, "search": what a search says of itself or None, "recipe": what it
        found, "targets": [...], "met": whether all are met}.
    """
    check_runtimes(runtimes, threads)
    foresee_names(recipe.steps, model)
    need_float32(unwrapped(model), task.example)
    model = opened(copied(unwrapped(model)).eval(), task.example)
    say_inputs(task)
    foreseen = foresee_files(model, task)
    # Nothing here is to be scored, so the test set is not even there.
    task = dataclasses.replace(task, original=copy.deepcopy(model).eval(), test=None)
    whole, said = searched(recipe.steps, copy.deepcopy(model).eval(), task, None)
    steps = [kept for kept in map(without_training, whole) if kept is not None]
    left_out = [step.name for step in whole if without_training(step) is None]
    with tempfile.TemporaryDirectory() as folder:
        after = [_After("original", copy.deepcopy(model).eval(), task)]
        # First, to hear early of what cannot be written.
        shipped = [ship(after[0].model, task, Path(folder), "00", runtimes)]
        for index, step in enumerate(steps, start=1):
            with remembering(steps, model), listening() as heard, collecting() as findings:
                changed, plan = step.run(copy.deepcopy(after[-1].model), after[-1].task)
            left = [each.to_json(name) for name, each in heard]
            then = step.task_after(after[-1].task, plan)
            after.append(_After(f"{index}. {step.name}", changed.eval(), then, left, findings))
        for index, each in enumerate(after[1:], start=1):
            shipped.append(ship(each.model, each.task, Path(folder), f"{index:02d}", runtimes))
        timed = {
            runtime: time_files(
                {at.name: (each.files[READS[runtime]], at.task) for at, each in zip(after, shipped, strict=True)},
                runtime, threads=threads, batch=batch, quiet=task.quiet,
            )
            for runtime in runtimes
            if all(READS[runtime] in each.files for each in shipped)
        }  # fmt: skip
        rows = _rows(after, shipped, timed)
    targets = judged(target if target.given else aim_of(recipe.steps), rows, runtimes[0])
    return {
        "machine": machine(), "rows": rows, "foreseen": foreseen, "left_out": left_out,
        "search": said["said"] if said else None,
        "recipe": Recipe(whole).dump(), "targets": targets, "met": all(each["met"] for each in targets),
    }  # fmt: skip


@dataclass(frozen=True)
class _After:
    """A model as it is after a step.

    Args:
        left_alone: what the step could not touch, as JSON.
        findings: what it said of itself.
    """

    name: str
    model: nn.Module
    task: Task
    left_alone: Sequence[dict[str, Any]] = ()
    findings: Sequence[str] = ()


def _rows(after: Sequence[_After], shipped: Sequence[Shipped], timed: dict[str, Measurement]) -> list[dict[str, Any]]:
    """What is shown of each, the original first."""
    rows: list[dict[str, Any]] = []
    for before, each, files in zip((None, *after), after, shipped, strict=False):
        cost = totals(each.model, each.task.example)
        row: dict[str, Any] = {
            "step": each.name, "params": cost.params, "macs": cost.macs, "file_bytes": files.file_bytes,
            "latency_ms": {runtime: found.latency(each.name) for runtime, found in timed.items()},
            "peak_bytes": peaks(timed, each.name), "notes": [*each.findings, *files.notes],
            **({"left_alone": list(each.left_alone)} if each.left_alone else {}),
        }  # fmt: skip
        if before is not None:
            for runtime, found in timed.items():
                ratio = found.ratio(each.name, before.name)
                row["latency_ms"][runtime]["left_of_previous"] = [ratio.ratio, ratio.low, ratio.high]
                row["notes"] += _verdict(row, rows[-1], runtime, ratio)
            if rounds_activations(each.model) and not rounds_activations(before.model):
                row["notes"] += [*slower_in_integers(timed, each.name, before.name)]
        rows.append(row)
    return rows


def _verdict(row: dict[str, Any], before: dict[str, Any], runtime: str, ratio: Any) -> list[str]:
    """What the measured time says about a step, in words."""
    if ratio.high < 1:
        return []
    if ratio.low > 1.02:
        return [f"{ratio.ratio:.2f}x slower in {runtime}: does not pay here"]
    if row["macs"] < before["macs"]:
        return [f"fewer multiply-adds but no faster in {runtime}"]
    return []


def dry_run_table(found: dict[str, Any]) -> Group:
    """The same for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = found["rows"]
    runtimes = list(rows[0]["latency_ms"])
    caption = f"not run: {', '.join(found['left_out'])}" if found["left_out"] else None
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), caption=caption, caption_justify="left")
    kind = next((kind for kind in ("onnx", "pt2", "terse") if all(kind in row["file_bytes"] for row in rows)), None)
    heads = ["step", "params", "MACs", *([f".{kind}"] if kind else []), *(f"ms in {runtime}" for runtime in runtimes)]
    for title in heads:
        table.add_column(title, justify="left" if title == "step" else "right", no_wrap=title == "step")
    for row in rows:
        times = [milliseconds_text(row["latency_ms"][name]["median"]).removesuffix(" ms") for name in runtimes]
        size = [bytes_text(row["file_bytes"][kind])] if kind else []
        table.add_row(row["step"], count_text(row["params"]), count_text(row["macs"]), *size, *times)
    said = [
        *found["foreseen"],
        *(search_lines(found["search"]) if found["search"] else ()),
        *map(_target_line, found["targets"]),
    ]
    return Group(table, *map(Text, notes(found)), *map(Text, said))


def _target_line(target: dict[str, Any]) -> str:
    return f"target {target['what']} {target['wanted']}: {target['got']}, {'met' if target['met'] else 'missed'}"


def places_text(places: dict[str, int]) -> str:
    """
    >>> places_text({"drop_blocks": 7, "prune_channels": 9})
    'drop_blocks at 7 places, prune_channels at 9'
    """
    parts = [f"{name} at {count}{' places' if not i else ''}" for i, (name, count) in enumerate(places.items())]
    return ", ".join(parts) or "nothing picked"


def search_lines(said: dict[str, Any]) -> list[str]:
    """What a search found, in words, one answer per line; the uniform policy among them."""
    unit, checks = said["target"]["unit"], said["checks"]
    lines = ["", f"budget {said['target']['asked']}: {said['target']['budget']:.4g} {unit}"]
    if checks["candidates"]:
        lines.append(
            f"latency table: {checks['candidates']} random candidates predicted to {percent(checks['error'])} (median)"
        )
    for each in said["proposals"]:
        mark = "*" if each == said["picked"] else " "
        loss = "" if each["divergence"] is None else f", divergence before training {each['divergence']:.3g}"
        lines.append(
            f"{mark} {each['name']}: predicted {each['predicted']:.4g}, measured {each['measured']:.4g} {unit}; "
            f"{places_text(each['places'])}{loss}"
        )
    return [*lines, said["note"]] if said["note"] else lines
