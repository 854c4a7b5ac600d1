"""Small whole numbers of a weight tensor, coded by range with models that follow their neighbourhood.

Weights of one output channel, of one input channel and of one kernel have magnitudes alike. So each number is coded
with a model for the mean magnitude that its neighbours foretell. The numbers go in *phases*, one from every kernel
in each, so that a phase is foretold by what came before it and can be coded as one array: the contexts come from
NumPy and one call of the coder takes all numbers of one context (static passes, not one model per number). Tensors of
one shape are decoded side by side.

Everything is in integers: logarithms are those of `log16`, models start as two-sided geometric distributions and
learn from counts, frequencies sum to 2**24. docs/format.md, "Context-coded numbers", gives it step by step.

Sources: contexts of neighbouring significance and magnitude as in DeepCABAC (Wiedemann et al., arXiv:1907.11900),
the mean over known neighbours in place of its few flags; ANS by `constriction` (Bamler, arXiv:2201.01741).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersenet.codec import adaptive
from tersenet.codec.adaptive import COUNT

Ints = NDArray[np.int64]
Numbers = NDArray[np.int32]

UNIT = 4096  # a mean magnitude of 1
CONTEXTS = 42  # half octaves of mean magnitude, from 1/4096 on
STRENGTHS = (16, 64, 256)  # counts that the starting model weighs
HEAD = struct.Struct("<hhBB")  # low, high, start, strength
LIMIT = 255  # largest magnitude
LONGEST = 1 << 30  # numbers of one tensor: keeps every product within 63 bits
_LARGEST_BLOCK = 1 << 16
_ROOTS = (4096, 4871, 5793, 6889)  # 4096 * 2**(i / 4)


class Known:
    """What has been coded so far of the numbers of T tensors, each laid out as (O rows, G kernels, P places).

    Args:
        shape: of the tensors.
        starts: (T,) the mean magnitude of all numbers of each, in quarter octaves of 1 / UNIT.
    """

    def __init__(self, shape: tuple[int, ...], starts: Sequence[int]) -> None:
        tensors = len(starts)
        self.rows, self.columns, self.period, self.kernels = layout(shape)
        self.groups = -(-self.columns // self.period)
        self.row_sums = np.zeros((tensors, self.rows), np.int64)
        self.column_sums = np.zeros((tensors, 1 if self.kernels else self.period, self.groups), np.int64)
        self.kernel_sums = np.zeros((tensors, self.rows, self.groups) if self.kernels else (0, 0, 0), np.int32)
        self.total = np.zeros(tensors, np.int64)
        self.supposed = np.array([16 * power4(start) for start in starts], np.int64)

    def in_phases(self, numbers: NDArray[Any]) -> NDArray[Any]:
        """(T, n) numbers, row-major -> (T, P, O, G) in the order of coding; 0 where the last group is not full."""
        padded = np.zeros((len(numbers), self.rows, self.groups * self.period), numbers.dtype)
        padded[:, :, : self.columns] = numbers.reshape(len(numbers), self.rows, self.columns)
        planes = np.empty((len(numbers), self.period, self.rows, self.groups), numbers.dtype)
        for plane, row in self._runs(planes, padded):
            plane[...] = row
        return planes

    def in_rows(self, planes: NDArray[Any]) -> NDArray[Any]:
        """The inverse of `in_phases`."""
        padded = np.empty((len(planes), self.rows, self.groups * self.period), planes.dtype)
        for plane, row in self._runs(planes, padded):
            row[...] = plane
        return padded[:, :, : self.columns].reshape(len(planes), -1)

    def _runs(self, planes: NDArray[Any], padded: NDArray[Any]) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Views of both that hold the same numbers: phase p takes the number (p - row) % P of every kernel."""
        period = self.period
        kernels = padded.reshape(len(padded), self.rows, self.groups, period)
        for row in range(min(period, self.rows)):
            plane, kernel = np.moveaxis(planes[:, :, row::period], 1, 3), kernels[:, row::period]
            yield plane[..., row:], kernel[..., : period - row]
            yield plane[..., :row], kernel[..., period - row :]

    def there(self, phase: int, first: int, stop: int) -> NDArray[np.bool_] | None:
        """(stop - first, G) which numbers of a block there are; None for all."""
        if self.groups * self.period == self.columns:
            return None
        found = np.ones((stop - first, self.groups), bool)
        inner = (phase - np.arange(first, stop)) % self.period
        found[:, -1] = (self.groups - 1) * self.period + inner < self.columns
        return found

    def contexts(self, phase: int, first: int, stop: int) -> NDArray[np.uint8]:
        """(T, stop - first, G) the context of each number of a block of rows."""
        rows, groups = stop - first, self.groups
        count = (phase * self.rows + first) * groups
        mean = np.maximum(1, (UNIT * self.total + self.supposed) // (count + 16))[:, None]
        sums = np.empty((len(mean), 1 + rows + groups), np.int64)
        sums[:, 0:1] = (phase * groups + 8) * mean
        sums[:, 1 : 1 + rows] = UNIT * self.row_sums[:, first:stop] + 8 * mean
        before = self.rows * phase + first
        group = (UNIT * np.add.reduce(self.column_sums, 1) + 8 * mean) // (before + 8)
        sums[:, 1 + rows :] = group + 1
        logs = log16(sums)
        row = logs[:, 1 : 1 + rows] - logs[:, 0:1]
        if self.kernels:
            foretold = logs[:, None, 1 + rows :]
        else:
            inner = (phase - np.arange(first, stop)) % self.period
            few = rows < self.period  # wide rows: only the columns that come
            column = (self.column_sums[:, inner] if few else self.column_sums) * UNIT
            column += 4 * group[:, None]
            column //= before // self.period + 4
            column += 1
            foretold = log16(column) if few else log16(column)[:, inner]
        quarters = row[:, :, None] + (foretold + 2)
        quarters >>= 2
        _clip(quarters, 2 * CONTEXTS - 1)
        if not phase or not self.kernels:
            return _clip((quarters + 1) >> 1, CONTEXTS - 1).astype(np.uint8)
        quarters *= LIMIT + 1
        quarters += np.minimum(self.kernel_sums[:, first:stop], LIMIT)
        return _table(phase).take(quarters)

    def add(self, phase: int, first: int, stop: int, magnitudes: Numbers) -> None:
        """Takes in a block's (T, stop - first, G) magnitudes."""
        rows = np.add.reduce(magnitudes, 2, dtype=np.int64)
        self.row_sums[:, first:stop] += rows
        if self.kernels:
            self.kernel_sums[:, first:stop] += magnitudes
            self.column_sums[:, 0] += np.add.reduce(magnitudes, 1, dtype=np.int64)
        else:
            for i in range(min(self.period, stop - first)):
                self.column_sums[:, (phase - first - i) % self.period] += magnitudes[:, i :: self.period].sum(1)
        self.total += np.add.reduce(rows, 1)


@lru_cache(maxsize=64)
def _table(phase: int) -> NDArray[np.uint8]:
    """(2 CONTEXTS * (LIMIT + 1),) contexts by foretold mean (quarter octaves) and sum of a kernel's `phase` numbers."""
    means = np.array([power4(j) for j in range(2 * CONTEXTS)], np.int64)
    sums = np.arange(LIMIT + 1, dtype=np.int64)
    logs = log16((UNIT * sums[None, :] + 6 * means[:, None]) // (phase + 6))
    return _clip((logs + 4) >> 3, CONTEXTS - 1).astype(np.uint8).reshape(-1)


def log16(x: Ints) -> Ints:
    """16 log2(x), interpolated linearly between powers of two and rounded down; x from 1 to 2**52 (0 gives -32)."""
    mantissa, exponent = np.frexp(x.astype(np.float64))  # exact
    mantissa *= 32
    logs = mantissa.astype(np.int64)
    exponent *= 16
    logs += exponent
    logs -= 32
    return logs


def log16_of_one(x: int) -> int:
    """`log16` of one number, at least 1, for which NumPy would take ten times as long."""
    exponent = x.bit_length() - 1
    return 16 * exponent + ((x - (1 << exponent)) << 4 >> exponent)


def _clip(x: Ints, high: int) -> Ints:
    """x within 0..high, in place: NumPy's own clip takes longer than this for few numbers."""
    return np.minimum(np.maximum(x, 0, out=x), high, out=x)


def power4(x: int) -> int:
    """About 2**(x / 4), at least 1."""
    return max(1, (_ROOTS[x & 3] << (x >> 2)) >> 12)


def layout(shape: tuple[int, ...]) -> tuple[int, int, int, bool]:
    """Rows O and columns I * K of a tensor, its period, and whether that is K, the size of a kernel (4 to 32)."""
    if len(shape) < 2:
        return math.prod(shape), 1, 1, False
    columns, kernel = math.prod(shape[1:]), math.prod(shape[2:])
    if 4 <= kernel <= 32:
        return shape[0], columns, kernel, True
    return shape[0], columns, min(8, columns), False


def blocks(rows: int, groups: int, period: int) -> Iterator[tuple[int, int, int]]:
    """(phase, first row, row after the last): as long as all before it, 64 to 65,536 numbers."""
    for phase in range(period):
        first = 0
        while first < rows:
            known = (phase * rows + first) * groups
            stop = min(rows, first + max(1, min(max(64, known), _LARGEST_BLOCK) // groups))
            yield phase, first, stop
            first = stop


@lru_cache(maxsize=4096)
def starting_model(context: int, low: int, high: int, strength: int) -> tuple[int, ...]:
    """high - low + 1 weights that a context starts with: a geometric distribution of its mean, or, where low < 0, the
    sum of two two-sided ones (between Laplace and Gauss)."""
    mean = power4(2 * context)
    reach = max(high, -low)
    if low >= 0:
        table = _powers((mean << 16) // (UNIT + mean), reach)[low : high + 1]
    else:
        mean = max(1, 2 * mean // 3)  # of each of the two whose sum is wanted
        theta = (mean << 16) // (UNIT + math.isqrt(UNIT * UNIT + mean * mean))
        side = _powers(theta, reach)
        both = np.concatenate([side[:0:-1], side]) // (2 * side.sum() >> 20)
        table = np.convolve(both, both, "same")
        table = table[low + reach : high + reach + 1]
    return tuple((1 + table * (COUNT * STRENGTHS[strength]) // max(1, int(table.sum()))).tolist())


def _powers(theta: int, reach: int) -> Ints:
    side = [1 << 24]
    for _ in range(reach):
        side.append(side[-1] * theta >> 16)
    return np.array(side, np.int64)


def encode(q: Numbers, shape: tuple[int, ...], strengths: Sequence[int]) -> bytes:
    """What `decode` reads, the shortest: low, high (int16), start and strength (a byte each), the coder's words.

    Args:
        q: (n,) numbers of at most LIMIT in magnitude, n at least 1; row-major, of a tensor of `shape`.
        strengths: of the starting models, indices into STRENGTHS; each is tried.
    """
    start, low, high = start_of(q), int(q.min()), int(q.max())
    known = Known(shape, [start])
    (planes,) = known.in_phases(q[None])
    tables = [_models([low], [high], [strength]) for strength in strengths]
    jobs: list[list[adaptive.Job]] = [[] for _ in strengths]
    for phase, first, stop, is_last in _blocks(known):
        values = planes[phase, first:stop]
        contexts, there = known.contexts(phase, first, stop), known.there(phase, first, stop)
        order, present, sizes = adaptive.in_order(contexts, CONTEXTS, there)
        known.add(phase, first, stop, np.abs(values)[None])
        numbers = values.reshape(-1)[order]
        for each, its in zip(tables, jobs, strict=True):
            its.append((numbers - low, each.shares(present), sizes))
            if not is_last:
                each.learn(present, sizes, numbers)
    coded = [
        HEAD.pack(low, high, start, strength) + adaptive.encoded(its)
        for strength, its in zip(strengths, jobs, strict=True)
    ]
    return min(coded, key=len)


def contexts_of(q: Numbers, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """(n,) the context of each number of a tensor of `shape`, as `encode` has them."""
    known = Known(shape, [start_of(q)])
    magnitudes = np.abs(known.in_phases(q[None]))
    found = np.zeros(magnitudes.shape, np.uint8)
    for phase, first, stop, _ in _blocks(known):
        found[:, phase, first:stop] = known.contexts(phase, first, stop)
        known.add(phase, first, stop, magnitudes[:, phase, first:stop])
    return known.in_rows(found)[0]


def alike(stream: bytes, shape: tuple[int, ...]) -> Hashable:
    """Streams that give the same here can be decoded side by side.

    Raises:
        ValueError: when the stream cannot be one of ours; says why.
    """
    low, high, _, _ = _header(stream)
    return _widest(low, high)


def side_by_side(stream: bytes, shape: tuple[int, ...]) -> int:
    """How many streams like this one to decode at a time."""
    low, high, _, _ = _header(stream)
    rows, columns, period, _ = layout(shape)
    return adaptive.side_by_side(CONTEXTS, _widest(low, high), rows * -(-columns // period))


def decode(streams: Sequence[bytes], shape: tuple[int, ...]) -> list[Numbers]:
    """The (n,) numbers of tensors of one shape, at least one number each.

    Raises:
        ValueError: when a stream cannot be one of ours; says why.
    """
    heads = [_header(stream) for stream in streams]
    lows, highs, starts, strengths = map(list, zip(*heads, strict=True))
    known = Known(shape, starts)
    planes = np.empty((len(streams), known.period, known.rows, known.groups), np.int32)
    tables = _models(lows, highs, strengths)
    coders = [adaptive.opened(stream, HEAD.size) for stream in streams]
    for phase, first, stop, is_last in _blocks(known):
        contexts, there = known.contexts(phase, first, stop), known.there(phase, first, stop)
        order, present, sizes = adaptive.in_order(contexts, CONTEXTS, there)
        numbers = tables.take(coders, present, sizes)
        values = np.zeros(contexts.shape, np.int32)
        values.reshape(-1)[order] = numbers
        planes[:, phase, first:stop] = values
        if not is_last:
            tables.learn(present, sizes, numbers)
            known.add(phase, first, stop, np.abs(values))
    if not all(coder.is_empty() for coder in coders):
        raise ValueError("a context-coded stream holds more than its numbers")
    return list(known.in_rows(planes))


def _widest(low: int, high: int) -> int:
    """Of how many values the tensors may be that go side by side with one."""
    return max(64, 1 << (high - low + 1).bit_length())


def _header(stream: bytes) -> tuple[int, int, int, int]:
    if len(stream) < HEAD.size or (len(stream) - HEAD.size) % 4:
        raise ValueError(f"a context-coded stream has {len(stream)} bytes, which is no length of one")
    low, high, start, strength = HEAD.unpack_from(stream)
    if not -LIMIT <= low < high <= LIMIT or start >= 2 * CONTEXTS or strength >= len(STRENGTHS):
        raise ValueError(f"a context-coded stream starts with {low}, {high}, {start}, {strength}, which is not allowed")
    return low, high, start, strength


def start_of(q: Numbers) -> int:
    """The mean magnitude of (n,) numbers, in quarter octaves of 1 / UNIT."""
    return log16_of_one(max(1, UNIT * int(np.abs(q).sum(dtype=np.int64)) // len(q))) >> 2


def _models(lows: Sequence[int], highs: Sequence[int], strengths: Sequence[int]) -> adaptive.Models:
    def start(tensor: int, key: int) -> tuple[int, ...]:
        return starting_model(key, lows[tensor], highs[tensor], strengths[tensor])

    return adaptive.Models(CONTEXTS, lows, highs, start)


def _blocks(known: Known) -> Iterator[tuple[int, int, int, bool]]:
    """(phase, first row, row after the last, whether it is the last block)."""
    for phase, first, stop in blocks(known.rows, known.groups, known.period):
        yield phase, first, stop, (phase + 1, stop) == (known.period, known.rows)
