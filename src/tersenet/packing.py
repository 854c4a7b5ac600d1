"""`tersenet pack` under a budget: a model as one file, as small as a drop in points or a number of bytes allows.

No training and no labels: batch norms are folded, then `shrink_file` chooses grids and zeros. The test set is read
twice at the end, for the score of the model as it came and for that of the file, and never to choose.
"""

from __future__ import annotations

import copy
import time
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from tersenet.bricks.opened import copied, unwrapped
from tersenet.deploy.artifact import load_terse, save_terse
from tersenet.deploy.checked import checked
from tersenet.deploy.reference import Reference
from tersenet.errors import DataError, NoEffect, SettingsError
from tersenet.graph.costs import totals
from tersenet.graph.taken_apart import opened
from tersenet.inputs_said import say_inputs
from tersenet.numerics.scale import Scale
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.ship import inputs
from tersenet.size.judge import Judge
from tersenet.size.shrink_file import ShrinkFile, coded_bytes, wanted_bytes
from tersenet.task import Task, score_model


def check_budget(output: Path, data: bool, max_drop: float | None, bytes: str | int | None) -> None:
    """Raises SettingsError or DataError where `pack_within` cannot do what is asked. `data`: whether there is any."""
    if output.suffix != ".terse":
        raise SettingsError(f"the file to write is {output}; it must end in .terse")
    if (max_drop is None) == (bytes is None):
        raise SettingsError("a file is packed within a drop or within bytes, not both; give one of them")
    if max_drop is not None and not data:
        raise DataError("a drop can only be judged with data; name some with --data, or ask for --bytes")
    ShrinkFile(max_drop=max_drop, bytes=bytes)


def pack_within(
    model: nn.Module, task: Task, output: Path, *, max_drop: float | None = None, bytes: str | int | None = None
) -> dict[str, Any]:
    """Writes a model's file within one of two budgets.

    Args:
        model: is left as it was.
        task: its images choose the grids; without any, only bytes can be asked for.
        max_drop: points of score that may be lost; chosen by `size/judge.py`, then held against the test set.
        bytes: of the file, a number or a share such as "0.08x" of the float32 parameters.
    Returns:
        {"file", "bytes", "float32_bytes", "ratio", "seconds", "met"}, and what is known of "judged_by" and
        "judged_drop"; with a test set "score", "score_interval", "samples", "original_score" and "drop".
    Raises:
        SettingsError: for no budget or two, another ending than .terse, or a budget that no grid meets.
        DataError: for a drop without anything to judge it by.
    """
    given = task.train is not None or task.calibrate is not None or task.validate is not None
    check_budget(output, given, max_drop, bytes)
    started = time.monotonic()
    original = opened(copied(unwrapped(model)).eval(), task.example)
    if given:
        say_inputs(task)
    folded = _folded(original, task)
    whole = 4 * totals(original, task.example).params
    if bytes is None:
        made, _ = ShrinkFile(max_drop=max_drop).run(copy.deepcopy(folded), task)
        save_terse(made, task.example, output, task.preparation)
    else:
        made = _within_bytes(folded, task, output, wanted_bytes(bytes, whole))
    checked(output, ["pytorch"], Reference(made, task.example, inputs(task), task.seed))
    size = output.stat().st_size
    found: dict[str, Any] = {
        "file": str(output), "bytes": size, "float32_bytes": whole, "ratio": whole / size,
        "seconds": round(time.monotonic() - started, 1), "met": True,
    }  # fmt: skip
    if max_drop is not None:
        judge = Judge.of(folded, task, ShrinkFile(max_drop=max_drop).images)
        found |= {"judged_by": judge.said, "judged_drop": round(judge.drop(made), 4)}
    if task.test is not None:
        found |= _scores(original, output, task)
        found["met"] = max_drop is None or found["drop"] <= max_drop
    return found


def _folded(model: nn.Module, task: Task) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffect)  # there may be no norms
        return FoldBatchNorm().run(copy.deepcopy(model), task)[0]


def _within_bytes(folded: nn.Module, task: Task, output: Path, budget: int) -> nn.Module:
    """The graph takes room beside the tensors; how much is known once a file is written."""
    save_terse(folded, task.example, output, task.preparation)
    beside = output.stat().st_size - coded_bytes(folded)
    for _ in range(3):
        made, _ = ShrinkFile(bytes=max(1, budget - beside)).run(copy.deepcopy(folded), task)
        save_terse(made, task.example, output, task.preparation)
        over = output.stat().st_size - budget
        if over <= 0:
            break
        beside += over
    return made


def _scores(original: nn.Module, output: Path, task: Task) -> dict[str, Any]:
    assert task.test is not None
    before, after = score_model(original, task, task.test), score_model(load_terse(output), task, task.test)
    return {
        "score": after.value, "score_interval": after.interval and list(after.interval), "samples": after.samples,
        "original_score": before.value, "drop": round(task.scale.lost(before.value, after.value), 6),
        "metric": task.scale.to_json(),
    }  # fmt: skip


def said(found: dict[str, Any]) -> str:
    """The result in words."""
    lines = [
        f"{found['file']}: {found['bytes']:,} bytes; its float32 weights have {found['float32_bytes']:,} "
        f"({found['ratio']:.1f}x smaller)"
    ]
    if "score" in found:
        scale = Scale.of(found)
        lines.append(
            f"{scale.name} {scale.text(found['score'])} on {found['samples']:,} samples, the original's "
            f"{scale.text(found['original_score'])}: {scale.loss_text(found['drop'])} lost"
        )
    if not found["met"]:
        lines.append("that is more than was allowed: the drop was chosen without the test set, and missed on it")
    return "\n".join(lines)
