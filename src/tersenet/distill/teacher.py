"""The teacher's outputs for a batch: computed once, however many companions ask.

Companions are frozen settings and hold no state, so the last outputs are kept here, until the batch they belong to is
gone. The teacher is the task's original model unless a companion was given another, or several by name.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.bricks.evaluating import evaluating
from tersenet.errors import DataError, ModelError, SettingsError
from tersenet.task import Task


class _Last:
    """One teacher's outputs for one batch. The batch is known by its first tensor: which one, and which version."""

    def __init__(self) -> None:
        self.forget()

    def forget(self, _: Any = None) -> None:
        self.teacher: weakref.ref[nn.Module] | None = None
        self.anchor: weakref.ref[Tensor] | None = None
        self.version, self.outputs = -1, None

    def holds(self, teacher: nn.Module, anchor: Tensor) -> bool:
        return (
            self.teacher is not None
            and self.anchor is not None
            and self.teacher() is teacher
            and self.anchor() is anchor
            and self.version == anchor._version
        )

    def keep(self, teacher: nn.Module, anchor: Tensor, outputs: Any) -> None:
        self.teacher, self.anchor = weakref.ref(teacher), weakref.ref(anchor, self._gone)
        self.version, self.outputs = anchor._version, outputs

    def _gone(self, reference: Any) -> None:
        if reference is self.anchor:
            self.forget()


_last = _Last()
# Copies of teachers on the devices that students train on; the teacher itself stays where it is.
_copies: weakref.WeakKeyDictionary[nn.Module, dict[torch.device, nn.Module]] = weakref.WeakKeyDictionary()


class Together(nn.Module):
    """Several teachers as one: the mean of their logits, the geometric mean of their probabilities (Hinton, Vinyals &
    Dean, section 2, names it beside the arithmetic one; at high temperatures they are alike)."""

    def __init__(self, teachers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)

    def forward(self, *inputs: Tensor) -> Tensor:
        """(N, classes, ...) from inputs as each of them takes them.

        Raises:
            ModelError: when they give no tensors of one shape.
        """
        found = [teacher(*inputs) for teacher in self.teachers]
        shapes = [tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in found]
        if not isinstance(found[0], Tensor) or len(set(shapes)) > 1:
            raise ModelError(f"teachers must give logits of one shape, got {', '.join(map(str, shapes))}")
        return torch.stack(found).mean(0)


# Teachers that a recipe names, by the task's way of opening them: opened once, not at every batch.
_named: weakref.WeakKeyDictionary[Any, dict[tuple[str, ...], nn.Module]] = weakref.WeakKeyDictionary()


def named_teacher(names: tuple[str, ...], task: Task) -> nn.Module:
    """The teachers of these names (files, as a rule) as one.

    Raises:
        SettingsError: when the task cannot open names.
        FileError, ModelError: when there is no such file, or it takes other inputs.
    """
    if task.open_model is None:
        raise SettingsError(f"this task cannot open teachers by name ({', '.join(names)}); give teacher= a model")
    opened = _named.setdefault(task.open_model, {})
    if names not in opened:
        found = [task.open_model(name) for name in names]
        opened[names] = found[0] if len(found) == 1 else Together(found)
    return opened[names]


def teacher_outputs(model: nn.Module, task: Task, batch: Any, teacher: nn.Module | None = None) -> Any:
    """What the teacher says to a batch, in evaluation mode, without gradients, on the batch's device.

    Args:
        model: the student; only to see that it is not its own teacher.
        task: gives the forward, and the original model as the teacher.
        batch: as given to `Companion.loss`.
        teacher: another teacher than the original.
    Raises:
        SettingsError: when there is no teacher, or the student would teach itself.
    """
    teacher = teacher if teacher is not None else task.original
    if teacher is None:
        raise SettingsError(
            "there is no teacher: task.original is None; give the original model to the task, or teacher="
        )
    if teacher is model:
        raise SettingsError("the teacher is the very model that is trained; give a copy of it: copy.deepcopy(model)")
    anchor = _first_tensor(batch)
    if anchor is None:
        raise DataError(f"a batch holds no tensor, it is {type(batch).__name__}; give (input, target) pairs or dicts")
    if not _last.holds(teacher, anchor):
        _last.keep(teacher, anchor, _ask(_on_device(teacher, anchor.device), task, batch))
    return _last.outputs


def _ask(teacher: nn.Module, task: Task, batch: Any) -> Any:
    with evaluating(teacher), torch.no_grad():
        return task.forward(teacher, batch)


def _on_device(teacher: nn.Module, device: torch.device) -> nn.Module:
    tensor = next(iter(teacher.parameters()), None)
    if tensor is None or tensor.device == device:
        return teacher
    copies = _copies.setdefault(teacher, {})
    if device not in copies:
        copies[device] = copy.deepcopy(teacher).to(device)
    return copies[device]


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else ()
    return next((found for found in map(_first_tensor, values) if found is not None), None)
