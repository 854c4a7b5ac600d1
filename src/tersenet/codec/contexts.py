"""Small whole numbers of a weight tensor, coded by range with models that follow their neighbourhood.

Weights of one output channel, of one input channel and of one kernel have magnitudes alike. So each number is coded
with a model for the mean magnitude that its neighbours foretell. The numbers go in *phases*, one from every kernel
in each, so that a phase is foretold by what came before it and can be coded as one array: the contexts come from
NumPy and one call of the coder takes all numbers of one context (static passes, not one model per number).

Everything is in integers: logarithms are those of `log16`, models start as two-sided geometric distributions and
learn from counts, frequencies sum to 2**24. docs/format.md, "Context-coded numbers", gives it step by step.

Sources: contexts of neighbouring significance and magnitude as in DeepCABAC (Wiedemann et al., arXiv:1907.11900),
the mean over known neighbours in place of its few flags; ANS by `constriction` (Bamler, arXiv:2201.01741).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import constriction
import numpy as np
from numpy.typing import NDArray

from tersenet.codec.entropy import PRECISION, categoricals

Ints = NDArray[np.int64]
Run = tuple[int, int, int]  # a context, and where its numbers start and end

UNIT = 4096  # a mean magnitude of 1
CONTEXTS = 42  # half octaves of mean magnitude, from 1/4096 on
STRENGTHS = (16, 64, 256)  # counts that the starting model weighs
HEAD = struct.Struct("<hhBB")  # low, high, start, strength
LIMIT = 255  # largest magnitude
LONGEST = 1 << 30  # numbers of one tensor: keeps every product within 63 bits
LARGEST_BLOCK = 1 << 16
_SMALL = 1 << 12  # numbers of a block whose places are remembered
_ROOTS = (4096, 4871, 5793, 6889)  # 4096 * 2**(i / 4)
_COUNT = 64  # what one count adds to a weight


@dataclass
class Known:
    """What has been coded so far of numbers laid out as (O rows, G kernels, P places)."""

    rows: int
    groups: int
    period: int
    kernels: bool  # whether the numbers of a group are one kernel, and alike
    start: int  # the mean magnitude of all, in quarter octaves of 1 / UNIT
    row_sums: Ints = field(init=False)
    column_sums: Ints = field(init=False)
    kernel_sums: NDArray[np.int32] = field(init=False)
    total: int = 0

    def __post_init__(self) -> None:
        self.row_sums = np.zeros(self.rows, np.int64)
        self.column_sums = np.zeros((self.period, self.groups), np.int64)
        self.kernel_sums = np.zeros((self.rows, self.groups) if self.kernels else (0, 0), np.int32)

    def contexts(self, phase: int, first: int, stop: int) -> NDArray[np.uint8]:
        """(stop - first, G) the context of each number of a block of rows."""
        count = (phase * self.rows + first) * self.groups
        mean = max(1, (UNIT * self.total + 16 * power4(self.start)) // (count + 16))
        row = log16(UNIT * self.row_sums[first:stop] + 8 * mean) - log16_of_one((phase * self.groups + 8) * mean)
        before = self.rows * phase + first
        group = (UNIT * self.column_sums.sum(0) + 8 * mean) // (before + 8)
        if self.kernels:
            foretold = log16(group + 1)[None, :]
        else:
            inner = (phase - np.arange(first, stop)) % self.period
            few = stop - first < self.period  # wide rows: only the columns that come
            column = (self.column_sums[inner] if few else self.column_sums) * UNIT
            column += 4 * group
            column //= before // self.period + 4
            column += 1
            foretold = log16(column) if few else log16(column)[inner]
        quarters = (row[:, None] + (foretold + 2)) >> 2
        _clip(quarters, 2 * CONTEXTS - 1)
        if not phase or not self.kernels:
            return _clip((quarters + 1) >> 1, CONTEXTS - 1).astype(np.uint8)
        sums = np.minimum(self.kernel_sums[first:stop], LIMIT)
        return _table(phase)[quarters, sums]

    def add(self, phase: int, first: int, stop: int, magnitudes: NDArray[np.int32]) -> None:
        """Takes in a block's (stop - first, G) magnitudes."""
        self.row_sums[first:stop] += magnitudes.sum(1)
        if self.kernels:
            self.kernel_sums[first:stop] += magnitudes
            self.column_sums[0] += magnitudes.sum(0)
        else:
            for i in range(min(self.period, stop - first)):
                self.column_sums[(phase - first - i) % self.period] += magnitudes[i :: self.period].sum(0)
        self.total += int(magnitudes.sum())


@lru_cache(maxsize=64)
def _table(phase: int) -> NDArray[np.uint8]:
    """(2 CONTEXTS, LIMIT + 1) contexts by foretold mean (quarter octaves) and sum of the kernel's `phase` numbers."""
    means = np.array([power4(j) for j in range(2 * CONTEXTS)], np.int64)
    sums = np.arange(LIMIT + 1, dtype=np.int64)
    logs = log16((UNIT * sums[None, :] + 6 * means[:, None]) // (phase + 6))
    return _clip((logs + 4) >> 3, CONTEXTS - 1).astype(np.uint8)


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
            stop = min(rows, first + max(1, min(max(64, known), LARGEST_BLOCK) // groups))
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
    return tuple((1 + table * (_COUNT * STRENGTHS[strength]) // max(1, int(table.sum()))).tolist())


def _powers(theta: int, reach: int) -> Ints:
    side = [1 << 24]
    for _ in range(reach):
        side.append(side[-1] * theta >> 16)
    return np.array(side, np.int64)


def encode(q: NDArray[np.int32], shape: tuple[int, ...], strength: int) -> bytes:
    """What `decode` reads: low, high (int16), start and strength (a byte each), the coder's words.

    Args:
        q: (n,) numbers of at most LIMIT in magnitude, n at least 1; row-major, of a tensor of `shape`.
        strength: of the starting models, an index into STRENGTHS.
    """
    rows, columns, period, kernels = layout(shape)
    groups = -(-columns // period)
    padded = np.zeros((rows, groups * period), np.int32)
    padded[:, :columns] = q.reshape(rows, columns)
    low, high = int(q.min()), int(q.max())
    total = int(np.abs(q).sum(dtype=np.int64))
    start = log16_of_one(max(1, UNIT * total // len(q))) >> 2
    known = Known(rows, groups, period, kernels, start)
    models = Models(low, high, strength)
    jobs = []
    for phase, first, stop in blocks(rows, groups, period):
        at, valid = _places(phase, first, stop, groups, period, columns)
        values = padded.reshape(-1)[at]
        contexts = known.contexts(phase, first, stop)
        known.add(phase, first, stop, np.abs(values))
        flat = values.reshape(-1)
        order, runs = _by_context(contexts, valid)
        symbols = flat[order] - low
        tables = categoricals(models.frequencies(runs))
        jobs += [(symbols[start:end], model) for (_, start, end), model in zip(runs, tables, strict=True)]
        models.learn(runs, symbols)
    coder = constriction.stream.stack.AnsCoder()
    for symbols, model in reversed(jobs):  # ANS is a stack: what is pushed last comes out first
        coder.encode_reverse(symbols, model)
    return HEAD.pack(low, high, start, strength) + coder.get_compressed().astype("<u4").tobytes()


def contexts_of(q: NDArray[np.int32], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """(n,) the context of each number of a tensor of `shape`, as `encode` has them."""
    rows, columns, period, kernels = layout(shape)
    groups = -(-columns // period)
    padded = np.zeros((rows, groups * period), np.int32)
    padded[:, :columns] = np.abs(q).reshape(rows, columns)
    start = log16_of_one(max(1, UNIT * int(padded.sum(dtype=np.int64)) // len(q))) >> 2
    known = Known(rows, groups, period, kernels, start)
    found = np.zeros(padded.shape, np.uint8)
    for phase, first, stop in blocks(rows, groups, period):
        at, _ = _places(phase, first, stop, groups, period, columns)
        found.reshape(-1)[at] = known.contexts(phase, first, stop)
        known.add(phase, first, stop, padded.reshape(-1)[at])
    return np.ascontiguousarray(found[:, :columns]).reshape(-1)


def decode(stream: bytes, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """The (n,) numbers of a tensor of `shape`, at least one.

    Raises:
        ValueError: when the stream cannot be one of ours; says why.
    """
    if len(stream) < HEAD.size or (len(stream) - HEAD.size) % 4:
        raise ValueError(f"a context-coded stream has {len(stream)} bytes, which is no length of one")
    low, high, start, strength = HEAD.unpack_from(stream)
    if not -LIMIT <= low < high <= LIMIT or start >= 2 * CONTEXTS or strength >= len(STRENGTHS):
        raise ValueError(f"a context-coded stream starts with {low}, {high}, {start}, {strength}, which is not allowed")
    rows, columns, period, kernels = layout(shape)
    groups = -(-columns // period)
    padded = np.zeros((rows, groups * period), np.int32)
    known = Known(rows, groups, period, kernels, start)
    models = Models(low, high, strength)
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(stream, "<u4", offset=HEAD.size).astype(np.uint32))
    for phase, first, stop in blocks(rows, groups, period):
        at, valid = _places(phase, first, stop, groups, period, columns)
        contexts = known.contexts(phase, first, stop)
        order, runs = _by_context(contexts, valid)
        symbols = np.empty(len(order), np.int32)
        for (_, start, end), model in zip(runs, categoricals(models.frequencies(runs)), strict=True):
            symbols[start:end] = coder.decode(model, end - start)
        models.learn(runs, symbols)
        values = np.zeros(contexts.size, np.int32)
        values[order] = symbols + low
        block = values.reshape(contexts.shape)
        padded.reshape(-1)[at] = block
        known.add(phase, first, stop, np.abs(block))
    if not coder.is_empty():
        raise ValueError("a context-coded stream holds more than its numbers")
    return np.ascontiguousarray(padded[:, :columns]).reshape(-1)


class Models:
    """A model per context, made when it is first asked for; each learns from what it coded."""

    def __init__(self, low: int, high: int, strength: int) -> None:
        self.settings = (low, high, strength)
        self.weights = np.zeros((CONTEXTS, high - low + 1), np.int64)

    def frequencies(self, runs: list[Run]) -> Ints:
        """(len(runs), n) in proportion to the weights, at least 1, of sum 2**24; the largest gets what is missing."""
        chosen = [context for context, _, _ in runs]
        for context in chosen:
            if not self.weights[context, 0]:
                self.weights[context] = starting_model(context, *self.settings)
        weights = self.weights[chosen]
        sums = np.add.reduce(weights, 1, keepdims=True)  # `sum` itself, without what goes on around it
        weights *= (1 << PRECISION) - weights.shape[1]
        weights //= sums
        weights += 1
        weights[np.arange(len(weights)), weights.argmax(1)] += (1 << PRECISION) - np.add.reduce(weights, 1)
        return weights

    def learn(self, runs: list[Run], symbols: NDArray[np.int32]) -> None:
        """Takes in the symbols of each run."""
        size = self.weights.shape[1]
        cells = np.repeat([context * size for context, _, _ in runs], [end - start for _, start, end in runs]) + symbols
        self.weights += _COUNT * np.bincount(cells, minlength=self.weights.size).reshape(self.weights.shape)


def _places(
    phase: int, first: int, stop: int, groups: int, period: int, columns: int
) -> tuple[Ints, NDArray[np.bool_] | None]:
    """Where the numbers of a block lie, and which of them there are. Networks have many small layers of one shape."""
    find = _found if (stop - first) * groups > _SMALL else _kept
    return find(phase, first, stop, groups, period, columns)


def _found(
    phase: int, first: int, stop: int, groups: int, period: int, columns: int
) -> tuple[Ints, NDArray[np.bool_] | None]:
    rows = np.arange(first, stop, dtype=np.int64)
    inner = (phase - rows) % period
    at = (rows * (groups * period) + inner)[:, None] + (period * np.arange(groups, dtype=np.int64))[None, :]
    if groups * period == columns:
        return at, None
    valid = np.ones((stop - first, groups), bool)
    valid[:, -1] = (groups - 1) * period + inner < columns
    return at, valid


_kept = lru_cache(maxsize=512)(_found)


def _by_context(contexts: NDArray[np.uint8], valid: NDArray[np.bool_] | None) -> tuple[Ints, list[Run]]:
    """The places of a block's numbers in order of context, and each context's run in them."""
    flat = contexts.reshape(-1)
    if valid is not None:
        flat = np.where(valid.reshape(-1), flat, CONTEXTS)
    counts = np.bincount(flat, minlength=CONTEXTS)[:CONTEXTS]
    ends = np.cumsum(counts).tolist()
    present = np.flatnonzero(counts).tolist()
    runs = [(context, ends[context] - int(counts[context]), ends[context]) for context in present]
    return np.argsort(flat, kind="stable")[: ends[-1]], runs
