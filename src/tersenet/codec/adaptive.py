"""Tables of frequencies that learn from what they coded, and the coder that takes all numbers of a table in one call.

A table belongs to one tensor and one key (a context). Several tensors can be decoded side by side, each from its own
stream: NumPy then works on all of them at once, which is most of the time where tensors are small.
docs/format.md, "Context-coded numbers", gives the arithmetic; it is in whole numbers throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from tersenet.codec.entropy import PRECISION, categorical, shares

Ints = NDArray[np.int64]
Numbers = NDArray[np.int32]
Coder = constriction.stream.stack.AnsCoder
Categorical = constriction.stream.model.Categorical
Job = tuple[Numbers, Ints, Ints]  # symbols in order of key, the table of each key that comes, how often it comes

COUNT = 64  # what one count adds to a weight
_FAMILY = Categorical(perfect=False)
_TABLES = 1 << 22  # bytes of the tables of tensors that are decoded side by side
_LARGEST_PASS = 1 << 16  # numbers that are decoded in one pass
_SIDE_BY_SIDE = 64  # whose keys fit into 16 bits


def side_by_side(keys: int, width: int, largest: int) -> int:
    """How many tensors to decode at a time, of `keys` tables of `width` numbers and `largest` numbers in a pass."""
    return max(1, min(_SIDE_BY_SIDE, _LARGEST_PASS // largest, _TABLES // (8 * keys * width)))


class Models:
    """The tables of tensors whose numbers reach from low to high, made when a key first comes.

    Args:
        keys: tables of one tensor.
        lows, highs: (tensors,) the smallest and the largest number of each.
        start: the weights (made, high - low + 1) that tables start with, by tensor and key divided by `made`.
        made: how many tables are made together.
    """

    def __init__(
        self,
        keys: int,
        lows: Sequence[int],
        highs: Sequence[int],
        start: Callable[[int, int], Sequence[int] | Ints],
        made: int = 1,
    ) -> None:
        self.keys, self._start, self._together = keys, start, made
        self.widths = [high - low + 1 for low, high in zip(lows, highs, strict=True)]
        self.weights = np.zeros((len(lows) * keys, max(self.widths)), np.int64)
        self._made = np.zeros(len(self.weights), bool)
        self._left = (1 << PRECISION) - np.repeat(np.array(self.widths, np.int64), keys)[:, None]
        self._low = np.repeat(np.array(lows, np.int64), keys)
        self._lows = np.array(lows, np.int32)[:, None]

    def shares(self, present: Ints) -> Ints:
        """(len(present), n) frequencies less 1, which is what the coder wants to be told; 0 beyond a tensor's own n."""
        made = self._made[present]
        if not made.all():
            size = self._together
            for group in dict.fromkeys((present[~made] // size).tolist()):
                tensor, key = divmod(group * size, self.keys)
                self.weights[group * size : (group + 1) * size, : self.widths[tensor]] = self._start(
                    tensor, key // size
                )
                self._made[group * size : (group + 1) * size] = True
        return shares(self.weights[present], self._left[present])

    def learn(self, present: Ints, sizes: Ints, numbers: Numbers) -> None:
        """Takes in numbers, `sizes` of each key in turn."""
        width = self.weights.shape[1]
        cells = np.repeat(np.arange(0, len(present) * width, width) - self._low[present], sizes)
        cells += numbers
        counts = np.bincount(cells, minlength=len(present) * width).reshape(len(present), width)
        counts *= COUNT
        self.weights[present] += counts

    def take(self, coders: Sequence[Any], present: Ints, sizes: Ints) -> Numbers:
        """The next numbers of all tensors, `sizes` of each key in turn and of each tensor as many."""
        if not len(sizes):
            return np.empty(0, np.int32)
        table, counts = self.shares(present), sizes.tolist()
        exact, each = table.astype(np.float64), sum(counts) // len(coders)
        ends = np.searchsorted(present, np.arange(1, len(coders) + 1) * self.keys).tolist()
        parts, first = list[Numbers](), 0
        for coder, end, width in zip(coders, ends, self.widths, strict=True):
            if _at_once(each, end - first, width):
                rows = table[first:end, :width].astype(np.float32)
                parts.append(coder.decode(_FAMILY, np.repeat(rows, sizes[first:end], axis=0)))
            else:
                runs = zip(exact[first:end, :width], counts[first:end], strict=True)
                parts += [coder.decode(Categorical(row, perfect=False), count) for row, count in runs]
            first = end
        found = np.concatenate(parts)
        by_tensor = found.reshape(len(coders), each)
        by_tensor += self._lows
        return found


def in_order(keys: NDArray[np.uint8], count: int, valid: NDArray[np.bool_] | None = None) -> tuple[Ints, Ints, Ints]:
    """The places of a pass in order of tensor and key, the keys that come (tensor * count + key), and how often.

    Args:
        keys: (tensors, ...) each below `count`.
        valid: (...) which places there are; by default all.
    """
    tensors = len(keys)
    flat = keys.reshape(tensors, -1)
    order = flat.argsort(axis=1, kind="stable")
    if valid is not None:
        places = valid.reshape(-1)
        order = order[places[order]].reshape(tensors, -1)
        flat = flat[:, places]
    if tensors > 1:
        order += np.arange(0, keys.size, keys.size // tensors)[:, None]
        flat = flat + (count * np.arange(tensors, dtype=np.uint16))[:, None]
    counts = np.bincount(flat.reshape(-1), minlength=tensors * count)
    present = counts.nonzero()[0]
    return order.reshape(-1), present, counts[present]


def encoded(jobs: Sequence[Job], before: Iterable[tuple[Numbers, Any]] = ()) -> bytes:
    """The words of a stream that gives these symbols, in this order, behind those of `before` with a model each."""
    coder = Coder()
    for symbols, table, sizes in reversed(jobs):  # ANS is a stack: what is pushed last comes out first
        if _at_once(len(symbols), len(sizes), table.shape[1]):
            coder.encode_reverse(symbols, _FAMILY, np.repeat(table.astype(np.float32), sizes, axis=0))
            continue
        end = len(symbols)
        for row, count in zip(table[::-1], sizes[::-1].tolist(), strict=True):
            coder.encode_reverse(symbols[end - count : end], categorical(row))
            end -= count
    for symbols, model in before:
        coder.encode_reverse(symbols, model)
    return coder.get_compressed().astype("<u4").tobytes()


def opened(stream: bytes, offset: int) -> Any:
    """The coder that takes what `encoded` gave, from some byte of a stream on."""
    return Coder(np.frombuffer(stream, "<u4", offset=offset).astype(np.uint32))


def _at_once(numbers: int, keys: int, width: int) -> bool:
    """Whether one call with a table per number is faster than one per key (in nanoseconds); both code the same."""
    return numbers * (4 + 1.2 * width) + 2000 < 750 * keys
