"""Many tensors decoded at once: what can go side by side does.

A tensor's decoder is a generator. Where its payload holds a stream of a form that decodes side by side with others like
it, it yields that stream and is sent the numbers; what it returns is the decoded tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int32]
T = TypeVar("T")
S = TypeVar("S")


class Form(Protocol):
    """A module that decodes streams side by side: `contexts` and `predicted`."""

    def alike(self, stream: bytes, shape: tuple[int, ...]) -> Hashable: ...
    def side_by_side(self, stream: bytes, shape: tuple[int, ...]) -> int: ...
    def decode(self, streams: Sequence[bytes], shape: tuple[int, ...]) -> list[Numbers]: ...


@dataclass(frozen=True)
class Coded:
    """A stream that is to be decoded, and what it must share with those beside it."""

    form: Form
    stream: bytes
    shape: tuple[int, ...]

    @property
    def kind(self) -> Hashable:
        return self.form, self.shape, self.form.alike(self.stream, self.shape)


Decoding = Generator[Coded, Numbers, T]


def numbers_of(form: Form, stream: bytes, shape: tuple[int, ...]) -> Decoding[Numbers]:
    """Yields the stream once it has been looked at. Raises ValueError when it cannot be one of the form's."""
    form.alike(stream, shape)
    return (yield Coded(form, stream, shape))


def decoded(work: Decoding[T]) -> T:
    """The result of one decoder. Raises what it raises, ValueError for a stream that cannot be right."""
    return all_decoded([work])[0]


def all_decoded(works: Sequence[Decoding[T]], threads: int = 1) -> list[T]:
    """The results of decoders, in their order.

    Args:
        threads: how many are at work at a time.
    Raises:
        what they raise; of several that fail one.
    """
    results: dict[int, T] = {}

    def go_on(index: int, answer: Numbers | None) -> tuple[int, Coded] | None:
        try:
            return index, works[index].send(answer)  # type: ignore[arg-type]
        except StopIteration as stop:
            results[index] = stop.value
            return None

    def answer(group: list[tuple[int, Coded]]) -> list[tuple[int, Coded] | None]:
        """Decodes streams of one kind and goes on with their decoders. One that is wrong is found by itself."""
        first = group[0][1]
        try:
            found = first.form.decode([coded.stream for _, coded in group], first.shape)
        except ValueError as error:
            if len(group) > 1:
                return [step for one in group for step in answer([one])]
            works[group[0][0]].throw(error)
            raise
        return [go_on(index, numbers) for (index, _), numbers in zip(group, found, strict=True)]

    waiting = each(lambda index: go_on(index, None), range(len(works)), threads)
    while groups := _groups(step for step in waiting if step is not None):
        waiting = [step for steps in each(answer, groups, threads) for step in steps]
    return [results[index] for index in range(len(works))]


def _groups(waiting: Iterable[tuple[int, Coded]]) -> list[list[tuple[int, Coded]]]:
    """Streams of one kind together, as many as go side by side."""
    kinds: dict[Hashable, list[list[tuple[int, Coded]]]] = {}
    for index, coded in waiting:
        groups = kinds.setdefault(coded.kind, [[]])
        if len(groups[-1]) >= coded.form.side_by_side(coded.stream, coded.shape):
            groups.append([])
        groups[-1].append((index, coded))
    return [group for groups in kinds.values() for group in groups]


def each(work: Callable[[Any], S], items: Sequence[Any], threads: int) -> list[S]:
    """`work` of each item, in their order, `threads` at a time; the first that failed raises."""
    if threads <= 1 or len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))
