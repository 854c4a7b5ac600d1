"""`Resize`: inputs of another size, the cheapest way to fewer multiply-adds: they go with the square of the side.

The network stays as it is; what changes is the task of everything that follows, and what the files that ship say about
their inputs. Where several sizes are given, a search chooses (Howard et al., "MobileNets", arXiv:1704.04861, section
3.4, call the size a resolution multiplier and choose it by hand). The network was trained on objects of another size
in pixels, and recovery has to teach it the new ones (Touvron et al., "Fixing the train-test resolution discrepancy",
arXiv:1906.06423).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tersenet.errors import SettingsError
from tersenet.numerics.resizing import resized
from tersenet.step import Plan, Step
from tersenet.task import Task, batches_at

_SIZE = re.compile(r"(\d+)(?:x(\d+))?")


@dataclass(frozen=True, kw_only=True)
class Resize(Step):
    """Inputs of another size from here on. Networks whose graph holds the size of their input are refused.

    Args:
        sizes: "192" or "180x240" (height x width). One is taken; several are choices of a search, the task's own size
            always among them.
    """

    family: ClassVar[str] = "resize"
    summary: ClassVar[str] = "gives the network inputs of another size"
    serves: ClassVar[tuple[str, ...]] = ("networks without a written input size",)
    changes_structure: ClassVar[bool] = False
    changes_task: ClassVar[bool] = True
    chooses_layers: ClassVar[bool] = False

    sizes: tuple[str | int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.sizes,) if isinstance(self.sizes, str | int) else self.sizes
        object.__setattr__(self, "sizes", tuple(map(str, given)))
        if not self.sizes:
            raise SettingsError("sizes is empty; give at least one size of inputs, such as sizes: [192]")
        for text in self._texts:
            size_in(text)

    @property
    def _texts(self) -> tuple[str, ...]:
        return tuple(map(str, self.sizes))

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """{"size": [height, width]}; {} where that is the task's own size.

        Raises:
            SettingsError: when several sizes are given, or the network does not take inputs of this one.
        """
        if len(self.sizes) > 1:
            raise SettingsError(
                f"sizes are {', '.join(self._texts)}; several are choices of a search, a step by itself takes one"
            )
        size = size_in(self._texts[0])
        if size == tuple(task.example.shape[2:]):
            return {}
        check_takes(model, task, size)
        return {"size": list(size)}

    def task_after(self, task: Task, plan: Plan) -> Task:
        return at_size(task, (plan["size"][0], plan["size"][1])) if plan else task

    def choices(self, model: nn.Module, task: Task) -> dict[str, list[Any]]:
        """Of the whole network: its own size first.

        Raises:
            SettingsError: when the network does not take inputs of one of the sizes.
        """
        own = (int(task.example.shape[2]), int(task.example.shape[3]))
        others = [size for size in dict.fromkeys(map(size_in, self._texts)) if size != own]
        for size in others:
            check_takes(model, task, size)
        return {"": [size_text(size) for size in (own, *others)]} if others else {}

    def chosen(self, picked: Mapping[str, Any]) -> Resize | None:
        return dataclasses.replace(self, sizes=(picked[""],)) if picked else None


def size_in(text: str) -> tuple[int, int]:
    """ "192" -> (192, 192), "180x240" -> (180, 240). Raises SettingsError."""
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or int(match[1]) < 1 or int(match[2] or 1) < 1:
        raise SettingsError(f"{text!r} is no size of inputs; give one such as 192, or height x width such as 180x240")
    return int(match[1]), int(match[2] or match[1])


def size_text(size: tuple[int, int]) -> str:
    """
    >>> size_text((192, 192)), size_text((180, 240))
    ('192x192', '180x240')
    """
    return f"{size[0]}x{size[1]}"


def check_takes(model: nn.Module, task: Task, size: tuple[int, int]) -> None:
    """Raises SettingsError when the network does not run on inputs of this size, or its outputs have another shape."""
    if task.example.dim() != 4:
        shape = tuple(task.example.shape)
        raise SettingsError(f"inputs of shape {shape} have no size that could be changed; leave sizes out")
    own = size_text((int(task.example.shape[2]), int(task.example.shape[3])))
    refused = f"the network cannot take inputs of {size_text(size)} instead of {own}"
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            before, after = model(task.example), model(resized(task.example, size))
    except Exception as error:  # each network has errors of its own for shapes that do not fit
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise SettingsError(f"{refused}: its size is fixed in the graph ({why}); leave this size out") from error
    finally:
        for module in training:
            module.training = True
    if _shapes(before) != _shapes(after):
        raise SettingsError(f"{refused}: its outputs would have another shape; leave this size out")


def _shapes(outputs: Any) -> list[torch.Size]:
    return [leaf.shape for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def at_size(task: Task, size: tuple[int, int]) -> Task:
    """The task with inputs of another size.

    Images to train and calibrate on are the task's own, resized. What is scored is read anew at this size where the
    task can be opened again (`Task.reopen`), as a program that uses the file will read its images; else resized too.
    """
    preparation = dataclasses.replace(task.preparation, size=size)
    changed: dict[str, Any] = {
        name: None if data is None else Resized(data, size)
        for name, data in (("train", task.train), ("calibrate", task.calibrate))
    }
    reopen = task.reopen
    opened = None if reopen is None else functools.cache(lambda: reopen(preparation))
    for name in ("validate", "test"):
        data = getattr(task, name)
        if data is None:
            changed[name] = None
        elif opened is None:
            changed[name] = Resized(data, size)
        else:
            changed[name] = Later(functools.partial(lambda name, opened: getattr(opened(), name), name, opened))
    return dataclasses.replace(task, example=resized(task.example, size), preparation=preparation, **changed)


@dataclass(frozen=True)
class Resized:
    """Batches whose images have another size; in everything else those of `data`."""

    data: Iterable[Any]
    size: tuple[int, int]

    def __iter__(self) -> Iterator[Any]:
        return self.at(0)

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def at(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of an epoch from number `start` on."""
        for batch in batches_at(self.data, epoch, start):
            yield self._changed(batch)

    def _changed(self, batch: Any) -> Any:
        """Images are the floats (N, C, H, W) of a batch; labels and all else stay."""
        if isinstance(batch, Tensor):
            return resized(batch, self.size) if batch.dim() == 4 and batch.is_floating_point() else batch
        if isinstance(batch, dict):
            return {key: self._changed(value) for key, value in batch.items()}
        if isinstance(batch, tuple | list):
            return type(batch)(self._changed(value) for value in batch)
        return batch


@dataclass(frozen=True)
class Later:
    """Batches of data that is opened when they are asked for."""

    open: Callable[[], Iterable[Any]]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.open())

    def __len__(self) -> int:
        return len(self.open())  # type: ignore[arg-type]

    def at(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of an epoch from number `start` on."""
        return batches_at(self.open(), epoch, start)
