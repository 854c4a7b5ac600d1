"""What a score rests on, as a checksum: the test data, the forward and the metric. Another one means another score."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tersenet.task import Resumable, Task

# Batches of data that is read from a disk; what is in memory as a list is looked at whole.
_BATCHES = 8


def scored_on(task: Task) -> str | None:
    """A checksum of what the task's scores rest on; None where nothing is scored."""
    if task.test is None:
        return None
    rules = repr([_named(each) for each in (task.forward, task.metric)])
    return hashlib.sha256((data_digest(task.test) + rules).encode()).hexdigest()


def data_digest(data: Iterable[Any]) -> str:
    """A checksum of the number of batches and of some of them, inputs and targets; of a list, of all."""
    digest = hashlib.sha256(repr(len(data) if hasattr(data, "__len__") else None).encode())  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):  # a loader that shuffles draws; nothing else shall notice
        torch.default_generator.manual_seed(0)
        for batch in _some(data):
            _add(digest, batch)
    return digest.hexdigest()


def _some(data: Iterable[Any]) -> Iterator[Any]:
    if isinstance(data, list | tuple):
        yield from data
    elif isinstance(data, Resumable) and len(data):
        for start in sorted({round(i * (len(data) - 1) / (_BATCHES - 1)) for i in range(_BATCHES)}):
            yield from itertools.islice(data.at(0, start), 1)
    else:
        yield from itertools.islice(iter(data), _BATCHES)


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key, each in value.items():
            digest.update(repr(key).encode())
            _add(digest, each)
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} of".encode())
        for each in value:
            _add(digest, each)
    elif isinstance(value, str | int | float | bool | type(None)):
        digest.update(repr(value).encode())


def _named(function: Callable[..., Any] | None) -> Any:
    """A function by its name and code, so that the same one is known again in another process."""
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    if code is None:
        return name
    constants = [each for each in code.co_consts if isinstance(each, str | int | float | bool | type(None))]
    return name, code.co_code.hex(), constants, code.co_names
