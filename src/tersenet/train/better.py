"""Whether a training ended below its start: then the numbers that it began with are the better ones, and are kept.

With a held-out set the score on that decides. Else labelled training images do, augmented as no training has seen them,
where they tell start and end apart; where they do not, the end is worse when it is further from the original's outputs
(numerics/divergence.py), for a network knows the images that it was trained on by heart, and its labels say little
then. A start that is the original itself can only move away from it, so that distance says nothing of it. An original
that does not tell the classes apart is no measure, so a training from random numbers is not judged, and neither is one
with a loss of the caller's own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.bricks.evaluating import evaluating
from tersenet.numerics.divergence import divergence
from tersenet.numerics.intervals import wilson
from tersenet.numerics.scale import ACCURACY, Scale
from tersenet.task import Task, batch_target, default_loss, score_model, to_device
from tersenet.unseen import knows_classes, unseen_batches

_IMAGES = 1024
_ITSELF = 1e-6  # nats from the original's outputs, below which a model is the original


@dataclass(frozen=True)
class Standing:
    """How good a model is.

    Attributes:
        score: on the held-out set; None without one.
        scale: what it is counted in.
        right, images: labelled training images that it names rightly, of how many; 0 of 0 without labels.
        distance: divergence from the original's outputs, nats per sample.
    """

    score: float | None = None
    right: int = 0
    images: int = 0
    distance: float = 0.0
    scale: Scale = ACCURACY


def standing(model: nn.Module, task: Task, labelled: bool = True) -> Standing | None:
    """Where a model stands before or after a training; None where nothing can judge it.

    Args:
        labelled: whether the training learns from labels, which then judge too.
    """
    if task.validate is not None:
        return Standing(score=score_model(model, task, task.validate).value, scale=task.scale)
    data = task.train if task.train is not None else task.calibrate
    if data is None or task.original is None or task.metric is not None or task.loss is not default_loss:
        return None
    right, known, targets, distances = 0, 0, [], []
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    own = next((parameter.device for parameter in task.original.parameters()), device)
    original = task.original if own == device else copy.deepcopy(task.original).to(device)  # it stays where it is
    with evaluating(model), evaluating(original), torch.inference_mode():
        for batch in unseen_batches(data, _IMAGES, task.seed):
            batch = to_device(batch, device)
            outputs, reference = task.forward(model, batch), task.forward(original, batch)
            if not _are_logits(outputs):
                return None
            distances.append((len(outputs), divergence(reference, outputs)))
            if labelled and (target := _classes(batch)) is not None:
                targets.append(target)
                right += int((outputs.argmax(1) == target).sum())
                known += int((reference.argmax(1) == target).sum())
    images = sum(map(len, targets))
    if not distances or (images and not knows_classes(known, images, torch.cat(targets))):
        return None
    total = sum(count for count, _ in distances)
    return Standing(None, right, images, sum(count * each for count, each in distances) / total)


def _told_apart(after: Standing, before: Standing) -> bool:
    """Whether the labels alone say that the end is below the start."""
    return after.images > 0 and wilson(after.right, after.images)[1] < wilson(before.right, before.images)[0]


def is_worse(after: Standing, before: Standing) -> bool:
    """Whether the end of a training is below its start."""
    if after.score is not None and before.score is not None:
        return before.scale.lost(before.score, after.score) > 0
    if _told_apart(after, before):
        return True
    if _told_apart(before, after):
        return False
    return before.distance > _ITSELF and after.distance > before.distance


def said(after: Standing, before: Standing) -> str:
    """The sentence on a training that ended below its start."""
    if after.score is not None and before.score is not None:
        text = before.scale.text
        what = f"{text(after.score)} on the held-out set, {text(before.score)} before"
    elif _told_apart(after, before):
        what = (
            f"{100 * after.right / after.images:.1f} % of {after.images} augmented training images right, "
            f"{100 * before.right / before.images:.1f} % before"
        )
    else:
        what = f"{after.distance:.3g} nats from the original's outputs, {before.distance:.3g} before"
    return (
        f"this training ended below its start ({what}), so the numbers before it are kept; train longer, with a lower "
        "learning_rate or other augmentation, or set keep: last"
    )


def _classes(batch: Any) -> Tensor | None:
    """(N,) class numbers of a batch; None where it has none, or shares of classes."""
    has_some = isinstance(batch, dict) or (isinstance(batch, tuple | list) and len(batch) > 1)
    target = batch_target(batch) if has_some else None
    is_classes = isinstance(target, Tensor) and target.dim() == 1 and not target.is_floating_point()
    return target if is_classes else None


def _are_logits(outputs: Any) -> bool:
    return isinstance(outputs, Tensor) and outputs.dim() == 2 and outputs.shape[1] > 1
