"""The main job: a model, a task and a recipe or target in; a run folder with files, figures and a report out."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from tersenet import __version__
from tersenet.errors import DataError, RecipeError, SettingsError
from tersenet.prove import prove
from tersenet.recipe import Recipe
from tersenet.run import Journal, Run, identity_of
from tersenet.ship import check_runtimes
from tersenet.step import Chain, Step
from tersenet.task import Task, score_model


def share(text: str | float | None) -> float | None:
    """ "0.5x" -> 0.5. Raises SettingsError outside (0, 1]."""
    if text is None:
        return None
    try:
        value = float(str(text).removesuffix("x"))
    except ValueError:
        raise SettingsError(f"{text!r} is no share; give the part to keep, such as 0.5x") from None
    if not 0 < value <= 1:
        raise SettingsError(f"the share to keep must be in (0, 1], got {text}; 0.5x keeps half")
    return value


def recipe_of(path: Path | str | None = None, macs: str | float | None = None, epochs: int = 6) -> Recipe:
    """The recipe of a file, or the one that meets a target.

    A share of the multiply-adds is met by thinner layers, recovered with the original as teacher, then made int8.

    Raises:
        SettingsError: when both or neither are given.
    """
    if (path is None) == (macs is None):
        raise SettingsError("give either a recipe (--recipe FILE) or a target (--macs 0.5x)")
    if path is not None:
        return Recipe.read(path)
    from tersenet.distill.soft_targets import SoftTargets
    from tersenet.prune.prune_channels import PruneChannels
    from tersenet.quantize.quantize import Quantize
    from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
    from tersenet.train import Train

    # A margin, because int8 replaces parameter-free shortcuts by small convolutions, which count.
    kept = round(0.985 * (share(macs) or 1.0), 4)
    recovery = (Train(epochs=epochs, companions=(SoftTargets(),)),) if epochs else ()
    return Recipe((PruneChannels(macs=kept), *recovery, FoldBatchNorm(), Quantize()))


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
    max_macs: float | None = None,
    recover: Callable[[nn.Module, Task], None] | None = None,
    command: str | None = None,
    names: dict[str, str] | None = None,
) -> Run:
    """Compresses a model and proves it. Called again with the same folder, it goes on where it stopped.

    Args:
        model: is left as it was.
        recipe: a Recipe, steps, a YAML file, or a share of the multiply-adds such as "0.5x".
        out: the run folder.
        runtimes: of "onnxruntime", "openvino", "pytorch"; the first one's score and latency count.
        threads, batch: for latency.
        max_drop: target, points of score lost at most.
        max_macs: target, share of the multiply-adds at most.
        recover: your own training loop, in place of the recipe's `train` steps.
        command: what was typed, for the report.
        names: what to call things in the report, such as {"model": "resnet20", "data": "digits"}.
    Raises:
        TersenetError: one of its kinds, when something is missing or wrong; finished steps stay finished.
    """
    check_runtimes(runtimes)
    steps = _steps(recipe, recover)
    _check_data(steps, task)
    if max_drop is not None and task.test is None:
        raise DataError("max_drop needs a test set to be judged on; give labelled data, or leave it out")
    original = copy.deepcopy(model).eval()
    task = dataclasses.replace(task, original=original)
    settings = {
        "model": type(model).__name__, "seed": task.seed, "runtimes": list(runtimes), "runtime": runtimes[0],
        "threads": threads, "batch": batch, "max_drop": max_drop, "max_macs": max_macs, "version": __version__,
        **(names or {}),
    }  # fmt: skip
    journal = Journal(Path(out), steps, _identity(original, task, steps))
    say = functools.partial(Console(stderr=True, quiet=task.quiet, highlight=False).print, soft_wrap=True)
    started = time.monotonic()
    _run_steps(journal, original, task, say)
    report_path = Path(out) / "report.json"
    if report_path.exists() and Run(out).report["settings"].items() >= _judged(settings).items():
        say(f"{out} is finished already")
        return Run(out)
    settings["seconds"] = round(time.monotonic() - started, 1)
    prove(journal, original, task, settings, command, say)
    return Run(out)


def _judged(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "seconds"}


def _steps(recipe: Recipe | Sequence[Step] | str | Path, recover: Any) -> tuple[Step, ...]:
    if isinstance(recipe, str) and recipe.endswith("x"):
        recipe = recipe_of(macs=recipe)
    if isinstance(recipe, str | Path):
        recipe = Recipe.read(recipe)
    steps = tuple(recipe.steps) if isinstance(recipe, Recipe) else tuple(recipe)
    if not steps:
        raise RecipeError("the recipe has no steps; give at least one")
    if recover is not None:
        from tersenet.train import Recover

        steps = tuple(Recover(recover=recover) if step.family == "train" else step for step in steps)
    return steps


def _check_data(steps: Sequence[Step], task: Task) -> None:
    """Says which steps remain when there are no labels, or no data at all."""
    have_inputs = task.train is not None or task.calibrate is not None
    have = {"nothing"} | ({"inputs"} if have_inputs else set()) | ({"labels"} if task.train is not None else set())
    flat = [inner for step in steps for inner in (step.steps if isinstance(step, Chain) else (step,))]
    lacking = [step.name for step in flat if step.data_needed() not in have]
    if lacking:
        remain = ", ".join(step.name for step in flat if step.data_needed() in have) or "none"
        what = "labelled training data" if have_inputs else "data"
        raise DataError(f"there is no {what} for {', '.join(lacking)}; of this recipe these steps remain: {remain}")


def _identity(original: nn.Module, task: Task, steps: Sequence[Step]) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    try:
        recipe = Recipe(tuple(steps)).dump()
    except RecipeError:  # a step made in Python, such as Recover
        recipe = repr(steps)
    sizes = [len(data) if hasattr(data, "__len__") else None for data in (task.train, task.calibrate)]  # type: ignore[arg-type]
    data = hashlib.sha256(task.example.numpy().tobytes() + repr((sizes, task.preparation)).encode()).hexdigest()
    return {"recipe": recipe, "starting model": identity_of(original), "data": data, "seed": task.seed}


def _run_steps(journal: Journal, original: nn.Module, task: Task, say: Callable[..., None]) -> None:
    """Runs what is not done yet, one record per step."""
    done = len(journal.entries)
    if done == len(journal.steps):
        return
    if done:
        say(f"going on after {done} finished step{'s' if done > 1 else ''}")
    model = journal.replay(original, done)
    for index, step in enumerate(journal.steps[done:], start=done + 1):
        say(f"[bold]{index}/{len(journal.steps)}[/bold] {step.name}")
        started = time.monotonic()
        folder = journal.training_folder(index, step.name)
        model, plan = step.run(model, dataclasses.replace(task, folder=folder))
        found = {"seconds": round(time.monotonic() - started, 2)}
        if task.test is not None:
            found["score"] = score_model(model, task, task.test).value
            say(f"    score in PyTorch {100 * found['score']:.2f} %")
        journal.record(index, step, plan, found, model)
