"""Soft targets: the student learns the teacher's probabilities, softened by a temperature.

Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531, section 2.
Departs from it: the two losses are weighted apart (`weight` here, `label_weight` in Train) instead of summing to one,
and the cross-entropy with the teacher is written as a KL divergence, which differs by a constant (the entropy of the
teacher), has the same gradient, and is 0 when student and teacher agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.distill.teacher import named_teacher, teacher_outputs
from tersenet.errors import ModelError, SettingsError
from tersenet.step import Companion
from tersenet.task import Task


@dataclass(frozen=True, kw_only=True)
class SoftTargets(Companion):
    """weight * T^2 * KL(softmax(teacher / T) || softmax(student / T)), the mean over the samples.

    With teacher logits v and student logits z of one sample, p = softmax(v / T) and q = softmax(z / T):

        loss = weight * T^2 * sum_k p_k (log p_k - log q_k)        d loss / d z_k = weight * T * (q_k - p_k)

    q - p shrinks like 1 / T, so the factor T^2 keeps the gradient's size the same at every temperature, and with it
    the balance against the labels: the whole loss is `label_weight * labels + this`. For Hinton's weighted average
    with share a for the teacher, use weight: a and label_weight: 1 - a; for unlabelled data, label_weight: 0.

    Args:
        temperature: T, above 0; larger softens more.
        weight: of this loss, at least 0.
        teacher: another teacher than the task's original model (Python only).
        teachers: files that teach instead of the original, such as .terse ones: one, or several whose logits are
            averaged. They must take the same inputs. Several networks together are usually better than each, and a
            student then has more to learn than from its own original.
    """

    summary: ClassVar[str] = "follows the original model's softened probabilities (Hinton et al., 2015)"

    temperature: float = 4.0
    weight: float = 0.9
    teacher: nn.Module | None = None
    teachers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.teacher is not None and self.teachers:
            raise SettingsError("give teacher or teachers, not both")
        if not 0 < self.temperature < math.inf:
            raise SettingsError(f"temperature must be above 0, got {self.temperature}; 4 is usual")
        if not 0 <= self.weight < math.inf:
            raise SettingsError(f"weight must be at least 0, got {self.weight}")

    @property
    def trades(self) -> bool:
        """Away from the original, where another network teaches."""
        return self.teacher is not None or bool(self.teachers)

    def opened(self, task: Task) -> SoftTargets:
        return replace(self, teacher=named_teacher(self.teachers, task), teachers=()) if self.teachers else self

    def loss(self, model: nn.Module, task: Task, batch: Any, outputs: Any) -> Tensor:
        """For outputs (N, classes) or (N, classes, ...); the mean is over everything but the classes.

        Raises:
            SettingsError: without a teacher.
            ModelError: when outputs are no tensor of logits, or not of the teacher's shape.
        """
        wanted = teacher_outputs(model, task, batch, self.opened(task).teacher)
        if not isinstance(outputs, Tensor) or not isinstance(wanted, Tensor) or outputs.ndim < 2:
            raise ModelError(
                f"soft targets need logits (N, classes), but the model gives {type(outputs).__name__}; "
                "set task.forward so that it returns them"
            )
        if outputs.shape != wanted.shape:
            raise ModelError(
                f"the student gives {tuple(outputs.shape)} and the teacher {tuple(wanted.shape)}; they must agree"
            )
        return self.weight * soft_target_loss(outputs, wanted, self.temperature)


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) of logits (N, K, ...), the mean over N and `...`.

    The work is done in float32 at least, even under mixed precision.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    log_q = F.log_softmax(student.to(wide) / temperature, dim=1)
    log_p = F.log_softmax(teacher.to(wide) / temperature, dim=1)
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)  # (N, ...)
    return temperature**2 * divergence.mean()
