"""What a score rests on, as a checksum: the test data, the forward and the metric. Another one means another score."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from tersenet.metrics import Metric
from tersenet.task import Resumable, Task

# What data sets, those of torchvision among them, call their entries, and what they call a data set inside.
_LISTS = {"samples", "imgs", "images", "files", "paths", "targets", "labels", "data", "tensors", "indices"}
_INNER = {"dataset", "datasets"}
# Batches of data that is read from a disk; what is in memory as a list is looked at whole.
_BATCHES = 8


@runtime_checkable
class Digested(Protocol):
    """Data that knows a checksum of all that it holds."""

    def digest(self) -> str: ...


def scored_on(task: Task) -> str | None:
    """A checksum of what the task's scores rest on; None where nothing is scored."""
    if task.test is None:
        return None
    rules = repr([_named(each) for each in (task.forward, task.metric)])
    return hashlib.sha256((data_digest(task.test) + rules).encode()).hexdigest()


def data_digest(data: Iterable[Any], read: bool = True) -> str:
    """A checksum of data: of all that is in memory, of what a data set says of its files, and of some batches.

    Args:
        read: whether batches may be read where the order of two readings may differ, as in a loader that shuffles.
    """
    digest = hashlib.sha256(repr(len(data) if hasattr(data, "__len__") else None).encode())  # type: ignore[arg-type]
    if isinstance(data, Digested):
        digest.update(data.digest().encode())
        return digest.hexdigest()
    _add_held(digest, data)
    if not read and not isinstance(data, list | tuple | Resumable):
        return digest.hexdigest()
    with torch.random.fork_rng(devices=[]):  # a loader that shuffles draws; nothing else shall notice
        torch.default_generator.manual_seed(0)
        for batch in _some(data):
            _add(digest, batch)
    return digest.hexdigest()


def _add_held(digest: Any, data: Any, depth: int = 0) -> None:
    """What a loader's data set holds: tensors and arrays by their values, names of files with their sizes and times."""
    if isinstance(data, list | tuple | dict) or depth > 4:
        return
    for name, value in sorted(getattr(data, "__dict__", {}).items()):
        if name.startswith("_"):
            continue
        if isinstance(value, Tensor | np.ndarray):
            digest.update(name.encode())
            _add(digest, value)
        elif isinstance(value, list | tuple) and name in _LISTS:
            digest.update(name.encode())
            _add_listed(digest, value)
        elif name in _INNER:
            for inner in value if isinstance(value, list | tuple) else [value]:
                _add_held(digest, inner, depth + 1)


def _add_listed(digest: Any, values: Sequence[Any]) -> None:
    """Entries of a data set, such as (path, class)."""
    for value in values:
        if isinstance(value, list | tuple):
            _add_listed(digest, value)
        elif isinstance(value, str | os.PathLike):
            digest.update(str(value).encode())
            with contextlib.suppress(OSError, ValueError):  # most words are no files
                found = os.stat(value)
                digest.update(f"{found.st_size} {found.st_mtime_ns}".encode())
        else:
            _add(digest, value)


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
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.shape} {value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes() if value.dtype != object else repr(value).encode())
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


def _named(function: Callable[..., Any] | Metric | None) -> Any:
    """A function by its name and code, so that the same one is known again in another process."""
    if isinstance(function, Metric):
        return _named(function.update), _named(function.compute), function.scale, function.resamples
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    if code is None:
        return name
    constants = [each for each in code.co_consts if isinstance(each, str | int | float | bool | type(None))]
    return name, code.co_code.hex(), constants, code.co_names
