"""The main job: a model, a task and a recipe or target in; a run folder with files, figures and a report out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from tersenet import __version__
from tersenet.bricks.opened import copied, need_float32, unwrapped
from tersenet.errors import DataError, RecipeError, SettingsError
from tersenet.findings import collecting
from tersenet.graph.taken_apart import opened
from tersenet.inputs_said import near_chance, say_inputs
from tersenet.left_alone import lines, listening
from tersenet.named import foresee_names, remembering
from tersenet.prove import prove, say_not_written
from tersenet.recipe import Recipe
from tersenet.run import Journal, Run, identity_of
from tersenet.scored_on import data_digest, scored_on
from tersenet.ship import Shipped, check_runtimes, foresee_files, ship
from tersenet.step import Chain, Step
from tersenet.targets import NO_TARGET, Target, aim_of, keep_search, recipe_of, searched
from tersenet.task import Task, inputs_of, score_model, what_is_scored


def compress(
    model: nn.Module,
    task: Task,
    recipe: Recipe | Sequence[Step] | str | Path,
    *,
    out: str | Path = "run",
    runtimes: Sequence[str] = ("onnxruntime",),
    threads: int = 1,
    batch: int = 1,
    max_drop: float | None = None,
    target: Target = NO_TARGET,
    recover: Callable[[nn.Module, Task], None] | None = None,
    command: str | None = None,
    names: dict[str, str] | None = None,
) -> Run:
    """Compresses a model and proves it. Called again with the same folder, it goes on where it stopped.

    Args:
        model: is left as it was.
        recipe: a Recipe, steps, a YAML file, "int8", or a share of the latency such as "0.5x".
        out: the run folder.
        runtimes: of "onnxruntime", "openvino", "pytorch"; the first one's score and latency count.
        threads, batch: for latency.
        max_drop: target, points of score lost at most; of a metric that is no share, in its own unit.
        target: what the shipped files are held against in the report.
        recover: your own training loop, in place of the recipe's `train` steps.
        command: what was typed, for the report.
        names: what to call things in the report, such as {"model": "resnet20", "data": "digits"}.
    Raises:
        TersenetError: one of its kinds, when something is missing or wrong; finished steps stay finished.
    """
    if not isinstance(task, Task):
        raise SettingsError(
            f"task is of type {type(task).__name__}; make a Task of it, tersenet.Task(example=inputs, train=loader, "
            "test=other_loader), or open_task for data by name"
        )
    check_runtimes(runtimes)
    if isinstance(recipe, str) and recipe.endswith("x"):
        target = Target(latency=recipe)
        recipe = recipe_of(target=target, runtime=runtimes[0], threads=threads, batch=batch)
    steps = _steps(recipe)
    _with_loop(steps, recover)
    foresee_names(steps, model)
    _check_data(steps, task, max_drop)
    need_float32(unwrapped(model), task.example)
    original = opened(copied(unwrapped(model)).eval(), task.example)
    task = dataclasses.replace(task, original=original)
    target = target if target.given else aim_of(steps)
    settings = {
        "model": type(model).__name__, "seed": task.seed, "runtimes": list(runtimes), "runtime": runtimes[0],
        "threads": threads, "batch": batch, "max_drop": max_drop, "version": __version__,
        **{key: value for key, value in asdict(target).items() if value is not None},
        **(names or {}),
    }  # fmt: skip
    say = functools.partial(Console(stderr=True, quiet=task.quiet, highlight=False).print, soft_wrap=True)
    _say_foreseen(original, task, say)
    settings["scored_on"] = scored_on(task)
    started = time.monotonic()
    steps, said = searched(steps, original, task, Path(out))
    steps = _with_loop(steps, recover)
    journal = Journal(Path(out), steps, _identity(original, task, steps))
    settings["search"] = keep_search(said, Path(out))
    if _is_finished(journal, settings):
        say(f"{out} is finished already")
        return Run(out)
    shipped = {"original": _shipped(original, task, journal.folder / "files", runtimes, say)}
    if (near := near_chance(next(iter(shipped["original"].scores.values()), None), original, task)) is not None:
        say(near, markup=False)
    _run_steps(journal, original, task, say, settings["scored_on"])
    settings["seconds"] = round(time.monotonic() - started, 1)
    prove(journal, original, task, settings, target, command, say, shipped, [near] if near is not None else [])
    return Run(Path(out))


def _say_foreseen(original: nn.Module, task: Task, say: Callable[..., None]) -> None:
    say_inputs(task)
    for sentence in (*foresee_files(original, task), *filter(None, [what_is_scored(original, task)])):
        say(sentence, markup=False)


def _shipped(
    original: nn.Module, task: Task, folder: Path, runtimes: Sequence[str], say: Callable[..., None]
) -> Shipped:
    """The original's files, before the first step, to hear at once of one that cannot be written or is wrong."""
    say("files of original")
    found = ship(original, task, folder, "00-original", runtimes)
    say_not_written(found, say)
    return found


def _is_finished(journal: Journal, settings: dict[str, Any]) -> bool:
    """Whether the run is done and its report answers what is asked."""
    if len(journal.entries) < len(journal.steps) or not (journal.folder / "report.json").exists():
        return False
    asked = {key: value for key, value in settings.items() if key != "seconds"}
    return Run(journal.folder).report["settings"].items() >= asked.items()


def _steps(recipe: Recipe | Sequence[Step] | str | Path) -> tuple[Step, ...]:
    if isinstance(recipe, str | Path):
        recipe = Recipe.read(recipe)
    steps = tuple(recipe.steps) if isinstance(recipe, Recipe) else tuple(recipe)
    if not steps:
        raise RecipeError("the recipe has no steps; give at least one")
    return steps


def _with_loop(steps: Sequence[Step], recover: Callable[[nn.Module, Task], None] | None) -> tuple[Step, ...]:
    """The steps with the caller's own loop in place of each that trains, also inside of others.

    Raises:
        SettingsError: when none of them trains, so that the loop would never be called.
    """
    if recover is None:
        return tuple(steps)
    from tersenet.train import Recover

    trainings = 0

    def replaced(step: Step) -> Step:
        nonlocal trainings
        if step.family == "train":
            trainings += 1
            return Recover(recover=recover)
        inner = getattr(step, "steps", None)
        return step if inner is None else dataclasses.replace(step, steps=tuple(map(replaced, inner)))  # type: ignore[call-arg]

    found = tuple(map(replaced, steps))
    if not trainings:
        raise SettingsError(
            "recover is given, and no step of the recipe trains; add a train step where your loop is to run, such as "
            "tersenet.Train()"
        )
    return found


def _check_data(steps: Sequence[Step], task: Task, max_drop: float | None) -> None:
    """Raises where steps do not serve the model's inputs, and says which remain when there are no labels, or no data at
    all."""
    for step in steps:
        step.check_inputs(task)
    have_inputs = task.train is not None or task.calibrate is not None
    have = {"nothing"} | ({"inputs"} if have_inputs else set()) | ({"labels"} if task.train is not None else set())
    flat = [inner for step in steps for inner in (step.steps if isinstance(step, Chain) else (step,))]
    lacking = [step.name for step in flat if step.data_needed() not in have]
    if lacking:
        remain = ", ".join(step.name for step in flat if step.data_needed() in have) or "none"
        what = "labelled training data" if have_inputs else "data"
        raise DataError(f"there is no {what} for {', '.join(lacking)}; of this recipe these steps remain: {remain}")
    if max_drop is not None and task.test is None:
        raise DataError("max_drop needs a test set to be judged on; give labelled data, or leave it out")


def _identity(original: nn.Module, task: Task, steps: Sequence[Step]) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    try:
        recipe = Recipe(tuple(steps)).dump()
    except RecipeError:  # a step made in Python, such as Recover
        recipe = repr(steps)
    held = [None if data is None else data_digest(data, read=False) for data in (task.train, task.calibrate)]
    shown = b"".join(x.numpy().tobytes() for x in inputs_of((task.example, None)))
    data = hashlib.sha256(shown + repr((held, task.preparation)).encode()).hexdigest()
    held_out = None if task.validate is None else data_digest(task.validate)
    return {
        "recipe": recipe, "starting model": identity_of(original), "data": data, "held-out set": held_out,
        "seed": task.seed,
    }  # fmt: skip


def _run_steps(journal: Journal, original: nn.Module, task: Task, say: Callable[..., None], basis: str | None) -> None:
    """Runs what is not done yet, one record per step.

    Args:
        basis: what scores rest on (scored_on.py), kept beside them.
    """
    done = len(journal.entries)
    if done == len(journal.steps):
        return
    if done:
        say(f"going on after {done} finished step{'s' if done > 1 else ''}")
    for step in journal.steps[done:]:
        step.check(task)
    model, task = journal.replay(original, done), journal.task_after(task, done)
    for index, step in enumerate(journal.steps[done:], start=done + 1):
        say(f"[bold]{index}/{len(journal.steps)}[/bold] {step.name}")
        started = time.monotonic()
        folder = journal.training_folder(index, step.name)
        with remembering(journal.steps, original), listening() as heard, collecting() as findings:
            model, plan = step.run(model, dataclasses.replace(task, folder=folder))
        task = step.task_after(task, plan)
        found: dict[str, Any] = {"seconds": round(time.monotonic() - started, 2)}
        if findings:
            found["findings"] = findings
        if heard:
            found["left_alone"] = [left.to_json(name) for name, left in heard]
        for name, left in heard:
            inner = "" if name == step.name else f"{name}: "
            say("\n".join(f"    {text}" for text in (inner + lines(left)[0], *lines(left)[1:])), markup=False)
        if task.test is not None:
            found |= {"score": score_model(model, task, task.test).value, "scored_on": basis}
            say(f"    {task.scale.name} in PyTorch {task.scale.text(found['score'])}", markup=False)
        journal.record(index, step, plan, found, model)
