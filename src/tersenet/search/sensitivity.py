"""How much each pick hurts, alone and without training: the divergence from the original (numerics/divergence.py).

A split of the training set cannot judge a model that was trained on it, so nothing here looks at labels: the outputs
are compared with the original's on augmented training images. Kept on disk, by the weights and the settings.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.atomic import writing
from tersenet.numerics.divergence import divergence
from tersenet.numerics.outputs import joined
from tersenet.progress import progressing
from tersenet.search.costs import gone
from tersenet.search.sites import Site
from tersenet.step import Step
from tersenet.task import Task

Losses = dict[tuple[int, str], list[float]]


def outputs_of(model: nn.Module, images: Tensor) -> list[Tensor]:
    """All outputs of floating point (N, ...) in evaluation mode, in pieces of 64."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():
            return [each.float() for each in joined([model(part) for part in images.split(64)])]
    finally:
        for module in training:
            module.training = True


def find_losses(
    steps: Sequence[Step],
    sites: Sequence[Site],
    model: nn.Module,
    task: Task,
    images: Tensor | None,
    folder: Path | None,
    say: Callable[[str], None],
) -> Losses:
    """The loss of every setting of every site.

    Args:
        images: (N, ...) to compare on; None, or outputs that are no logits, estimates from the share taken away.
        folder: where results are kept; None keeps none.
    """
    if images is None:
        return {site.key: [_by_share(site, index) for index in range(len(site.settings))] for site in sites}
    path = None if folder is None else folder / f"{digest_of(steps, sites, model, images)}.json"
    if path is not None and path.exists():
        with contextlib.suppress(ValueError, OSError, KeyError, TypeError, RecursionError):
            saved = json.loads(path.read_text(encoding="utf-8"))
            return {site.key: _checked(saved[f"{site.step}:{site.place}"], site) for site in sites}
        say(f"the kept sensitivities {path} are damaged; they are found anew")
    losses: Losses = {}
    for index, step in enumerate(steps):
        own = [site for site in sites if site.step == index]
        if own:
            losses |= _of_step(step, own, model, task, images, say)
    for site in sites:  # more taken away never hurts less; what says so is noise
        row = losses[site.key]
        if gone(site, len(row) - 1) > 0:
            losses[site.key] = np.maximum.accumulate(np.maximum(row, 0.0)).tolist()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as temporary:
            kept = {f"{step}:{place}": row for (step, place), row in losses.items()}
            temporary.write_text(json.dumps(kept), encoding="utf-8")
    return losses


def _of_step(
    step: Step, sites: Sequence[Site], model: nn.Module, task: Task, images: Tensor, say: Callable[[str], None]
) -> Losses:
    say(f"sensitivities of {step.name}: {sum(len(site.settings) - 1 for site in sites)} choices")
    known = step.sensitivities(model, task, images)
    if known:
        return {site.key: [float(known[site.place][setting]) for setting in site.settings] for site in sites}
    wanted = outputs_of(model, images)
    few = dataclasses.replace(task, calibrate=[images], test=None, quiet=True)
    losses: Losses = {}
    with progressing(f"sensitivities of {step.name}", len(sites), not task.quiet) as advance:
        for site in sites:
            row = [0.0]
            for setting in site.settings[1:]:
                chosen = step.chosen({site.place: setting})
                assert chosen is not None
                changed, _ = chosen.run(copy.deepcopy(model), few)
                row.append(divergence(wanted, outputs_of(changed, images)))
            losses[site.key] = row
            advance(1)
    return losses


def _by_share(site: Site, index: int) -> float:
    """Without data: the square of the share that is taken away; a whole block counts 1."""
    share = gone(site, index) if gone(site, len(site.settings) - 1) > 0 else float(index > 0)
    return share**2


def _checked(row: Any, site: Site) -> list[float]:
    if len(row) != len(site.settings):
        raise ValueError("another number of settings")
    values = [float(value) for value in row]
    if not all(0 <= value < math.inf for value in values):
        raise ValueError("no divergence")
    return values


def kept_row(folder: Path | None, name: str, make: Callable[[], list[float]]) -> list[float]:
    """Numbers from the folder, or made and kept there; a damaged file is made anew."""
    path = None if folder is None else folder / f"{name}.json"
    if path is not None and path.exists():
        with contextlib.suppress(ValueError, OSError, TypeError, RecursionError):
            row = [float(value) for value in json.loads(path.read_text(encoding="utf-8"))]
            if row and all(map(math.isfinite, row)):
                return row
    row = make()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as temporary:
            temporary.write_text(json.dumps(row), encoding="utf-8")
    return row


def digest_of(
    steps: Sequence[Step], sites: Sequence[Site], model: nn.Module, images: Tensor, original: Tensor | None = None
) -> str:
    """What results on some images depend on: weights, images, choices, and the settings of the steps that pick."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(f"{key} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(images.numpy().tobytes())
    if original is not None and original.shape != images.shape:
        digest.update(original.numpy().tobytes())
    digest.update(repr([(site.key, site.settings) for site in sites]).encode())
    digest.update(repr([steps[index].settings() for index in sorted({site.step for site in sites})]).encode())
    return digest.hexdigest()[:24]
