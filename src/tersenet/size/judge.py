"""How many points of score a changed network is expected to lose, without the test set and without labels.

Where there is a held-out set it is the score on that. Else it is POINTS for each nat of divergence from the original's
outputs (numerics/divergence.py) on augmented training images that no training has seen. That is experience and no law:
rounded ResNet-20 and 56 lost 0.3 to 2.7 points a nat on test images (docs/size.md), and POINTS was picked after that
was seen. What was tried and told less: how many most likely classes
change, and what the original's probabilities say that this costs; a network is too sure of images it was trained on,
ResNet-56 by far more than ResNet-20.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersenet.bricks.evaluating import evaluating
from tersenet.errors import DataError, SettingsError
from tersenet.numerics.divergence import divergence
from tersenet.numerics.samples import as_batch, first, in_parts, together
from tersenet.task import Task, inputs_of, score_model
from tersenet.unseen import unseen_batches

POINTS = 3.0


@dataclass(frozen=True)
class Judge:
    """What a model gave before it was changed.

    Args:
        said: by what is judged, in words.
        before: its score on the held-out set, or its logits (N, classes) on the images.
        images: all inputs of as many samples as are looked at; None with a held-out set.
    """

    said: str
    task: Task
    before: float | Tensor
    images: tuple[Tensor, ...] | None

    @classmethod
    def of(cls, model: nn.Module, task: Task, images: int) -> Judge:
        """Raises DataError without anything to judge by, SettingsError where outputs are no logits."""
        if task.validate is not None:
            return cls("score on the held-out set", task, score_model(model, task, task.validate).value, None)
        data = task.train if task.train is not None else task.calibrate
        if data is None:
            raise DataError("nothing to judge a drop by; give a held-out set (--validate DATA) or training images")
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        batches = map(inputs_of, unseen_batches(data, images, task.seed))
        found = tuple(each.to(device) for each in first(together(batches), images))
        outputs = _outputs(model, task, found)
        if task.metric is not None or outputs.ndim != 2:
            raise SettingsError(
                "a drop without a held-out set can be told for logits (N, classes) under top-1 accuracy only; "
                "give one (--validate DATA), or ask for bytes"
            )
        return cls("divergence on augmented training images", task, outputs, found)

    def drop(self, model: nn.Module) -> float:
        """Points lost (of a metric that is no share, in its unit); on a held-out set negative where some were won."""
        if self.images is None:
            assert self.task.validate is not None
            assert not isinstance(self.before, Tensor)
            return self.task.scale.lost(self.before, score_model(model, self.task, self.task.validate).value)
        assert isinstance(self.before, Tensor)
        return POINTS * divergence(self.before, _outputs(model, self.task, self.images))


def _outputs(model: nn.Module, task: Task, images: tuple[Tensor, ...]) -> Tensor:
    with evaluating(model), torch.inference_mode():
        return torch.cat([task.forward(model, as_batch(part)) for part in in_parts(images, 256)]).clone()
