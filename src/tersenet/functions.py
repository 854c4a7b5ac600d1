"""The functions that people reach for first: `quantize` and `prune`, a model and a loader in, a new model out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

from rich.console import Console
from torch import nn

from tersenet.bricks.opened import copied, need_float32, unwrapped
from tersenet.bricks.settle import settle
from tersenet.errors import DataError, InputWarning
from tersenet.graph.costs import totals
from tersenet.graph.taken_apart import opened
from tersenet.inputs_said import near_chance
from tersenet.left_alone import lines, listening
from tersenet.loaders import class_labels, task_of
from tersenet.recipe import step_of
from tersenet.report.words import count_text
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.step import Chain, Step
from tersenet.targets import share
from tersenet.task import Score, Task, score_model

# Of these, how much is cut follows; without any of them it is half of the multiply-adds.
_AMOUNTS = ("sparsity", "widths", "percentile", "threshold", "keep")
_PRUNING_SAMPLES = 1024  # what PruneChannels looks at


def quantize(
    model: nn.Module,
    loader: Any,
    weights: str = "int8",
    activations: str | None = "int8",
    *,
    quiet: bool = False,
    **settings: Any,
) -> nn.Module:
    """Quantizes a model after training: batch norms folded, ranges calibrated on the loader's first samples.

    What comes back computes with the integers that the files will hold, in evaluation mode; `tersenet.export` writes it
    as ONNX with quantized operators, and `tersenet.QuantizeAware` is for those who want to train on. What stays float,
    what int8 costs where it costs much, and the accuracy before and after (where the loader has class labels) are
    printed on standard error.

    Args:
        model: is left as it was.
        loader: a DataLoader, a Dataset, batches, a tensor (N, ...) or a Task; inputs prepared as in training, of whose
            labels no use is made but to score.
        weights: int2 to int8, or another format of `Quantize`.
        activations: int2 to int8, or None for weights only (smaller, not faster).
        quiet: print nothing; warnings stay warnings.
        settings: any other of `Quantize`, such as skip=["head"], rounding="repaired", samples=1024.
    Raises:
        SettingsError: on a setting that there is not, or a value that is not allowed.
        DataError: when the loader gives no such batches, or the model does not take them.
        ModelError: when the model is not float32, or its forward cannot be captured.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)).eval()
    >>> small = quantize(net, torch.randn(64, 8), quiet=True)
    >>> {value.dtype for key, value in small.state_dict().items() if key.endswith("weight")}
    {torch.int8}
    """
    step = step_of("quantize", {"weights": weights, "activations": activations, **settings})
    task = task_of(model, loader, step.samples, quiet)
    original, task = _original(model, task)
    fold = FoldBatchNorm()
    steps = (fold, step) if fold.plan(original, task) else (step,)
    made = _run(Chain(steps=steps), original, task)
    made = settle(made).eval()
    _say_scores("quantize", original, made, task)
    return made


def prune(
    model: nn.Module,
    loader: Any,
    macs: float | str | None = None,
    *,
    params: float | str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> nn.Module:
    """Removes channels with everything that is coupled to them, and reconstructs the layers that read them.

    What comes back is really smaller and can be trained on, as it should be: in evaluation mode, with its batch norms.
    What could not be cut, multiply-adds, parameters and the accuracy before and after (where the loader has class
    labels) are printed on standard error.

    Args:
        model: is left as it was.
        loader: as in `quantize`; labels serve the importances that want a loss.
        macs: the share of the multiply-adds to be left at most, 0.5 or "0.5x"; also the default where nothing else
            says how much.
        params: the same of the parameters, in place of `macs`.
        quiet: print nothing; warnings stay warnings.
        settings: any of `PruneChannels`, such as multiple_of=8, importance="taylor", skip=["stem"], residual=True, or
            sparsity in place of `macs`.
    Raises:
        SettingsError: also when so few multiply-adds cannot be reached.
        DataError, ModelError: as `quantize`.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)).eval()
    >>> prune(net, torch.randn(64, 8), macs=0.5, quiet=True)[0]
    Linear(in_features=8, out_features=8, bias=True)
    """
    budgets = {"macs": macs, "params": params}
    if all(value is None for value in budgets.values()) and not any(name in settings for name in _AMOUNTS):
        budgets["macs"] = 0.5
    given = {name: share(value) for name, value in budgets.items() if value is not None}
    step = step_of("prune_channels", {**given, **settings})
    task = task_of(model, loader, _PRUNING_SAMPLES, quiet)
    original, task = _original(model, task)
    made = _run(step, original, task).eval()
    before, after = totals(original, task.example), totals(made, task.example)
    _say(task)(
        f"prune: {count_text(before.macs)} -> {count_text(after.macs)} multiply-adds, {count_text(before.params)} -> "
        f"{count_text(after.params)} parameters"
    )
    _say_scores("prune", original, made, task)
    return made


def _original(model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
    """The model as steps want it, on a copy, and the task that knows it."""
    need_float32(unwrapped(model), task.example)
    original = opened(copied(unwrapped(model)).eval(), task.example)
    return original, dataclasses.replace(task, original=original)


def _run(step: Step, original: nn.Module, task: Task) -> nn.Module:
    """Runs a step on a copy, and says what it left alone."""
    with listening() as heard:
        made, _ = step.run(copied(original), task)
    say = _say(task)
    for name, left in heard:
        head, *rest = lines(left)
        say("\n".join([f"{name}: {head}", *(f"    {line}" for line in rest)]))
    return made


def _say(task: Task) -> Callable[..., None]:
    return functools.partial(
        Console(stderr=True, quiet=task.quiet, highlight=False, markup=False).print, soft_wrap=True
    )


def _say_scores(name: str, original: nn.Module, made: nn.Module, task: Task) -> None:
    """The score before and after on the samples at hand, and a warning where the model knows nothing about them."""
    batches = list(task.calibration())
    before = _score(original, task, batches)
    if before is None:
        return
    after = _score(made, task, batches)
    if (near := near_chance(before, original, task)) is not None:
        warnings.warn(near.removeprefix("WARNING: "), InputWarning, stacklevel=3)
    if after is not None:
        scale = task.scale
        _say(task)(
            f"{name}: {scale.name} on these {before.samples} samples {scale.text(before.value)} -> "
            f"{scale.text(after.value)}"
        )


def _score(model: nn.Module, task: Task, batches: list[Any]) -> Score | None:
    """None where the samples have no labels, or the outputs are no class scores."""
    if task.metric is None and any(class_labels(batch) is None for batch in batches):
        return None
    with contextlib.suppress(DataError):  # targets that mean something else to the model's owner
        return score_model(model, task, batches)
    return None
