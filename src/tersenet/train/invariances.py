"""Which augmentation suits a trained model: what it was not taught to ignore would teach it something else.

Mirrored digits and letters mean something else, and a network that saw every object in the middle has to learn anew
where it is moved. The original is asked, on training images: an augmentation that costs it more than a few points is
left out of a training that starts from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersenet.bricks.evaluating import evaluating
from tersenet.findings import tell
from tersenet.numerics.intervals import wilson
from tersenet.task import Task, batch_target, default_loss, to_device
from tersenet.unseen import knows_classes, unseen_batches

_IMAGES = 256
_LOSS = 0.05
# What is tried after each other.
_LESS = {"crop_flip": ("crop_flip", "crop"), "crop": ("crop",)}


def suited(data: Any, task: Task) -> Any:
    """The training data with as much of its augmentation as the original stands; says what is left out.

    Data of other makers stay as they are, and so do those of an original that does not tell the classes apart.
    """
    wanted, like = getattr(data, "augment", None), getattr(data, "like", None)
    if like is None or wanted not in _LESS or task.metric is not None or task.loss is not default_loss:
        return data
    plain = _right(like(augment=None), task)
    if plain is None or not knows_classes(*plain, data.labels):
        return data
    tried = {augment: _right(like(augment=augment), task) for augment in _LESS[wanted]}
    kept = next((augment for augment, right in tried.items() if not _costs(plain, right)), None)
    if kept == wanted:
        return data
    shares = [100 * right[0] / right[1] for right in (plain, tried[wanted]) if right is not None]
    tell(
        [
            f"training images are augmented by {kept or 'nothing'} in place of {wanted}: the original has "
            f"{shares[0]:.1f} % right as they are and {shares[-1]:.1f} % with {wanted}; set augment: {wanted} to use "
            "it all the same"
        ],
        task.quiet,
    )
    return like(augment=kept)


def _costs(plain: tuple[int, int], changed: tuple[int, int] | None) -> bool:
    """Whether an augmentation costs the original more than a few points, beyond chance."""
    if changed is None:
        return True
    lost = plain[0] / plain[1] - changed[0] / changed[1]
    return lost > _LOSS and wilson(*changed)[1] < wilson(*plain)[0]


def _right(data: Any, task: Task) -> tuple[int, int] | None:
    """(images that the original names rightly, of how many); None without labels, logits or an original."""
    original, right, images = task.original, 0, 0
    if original is None:
        return None
    device = next((parameter.device for parameter in original.parameters()), torch.device("cpu"))
    with evaluating(original), torch.inference_mode():
        for batch in unseen_batches(data, _IMAGES, task.seed):
            if len(batch) < 2:
                return None
            batch = to_device(batch, device)
            outputs, target = task.forward(original, batch), batch_target(batch)
            if not isinstance(outputs, Tensor) or outputs.dim() != 2:
                return None
            right, images = right + int((outputs.argmax(1) == target).sum()), images + len(target)
    return right, images
