"""Lossless coding of a string of bytes: as it stands, one constant, or asymmetric numeral systems (ANS).

The entropy coder is J. Duda's ANS (arXiv:1311.2540) as `constriction` implements it (R. Bamler, arXiv:2201.01741).
Probabilities come from integers only: counts become frequencies that sum to exactly 2**24, and every one of them is a
whole number that float64 holds exactly, so a file decodes to the same bits on every machine.

No table of frequencies is stored. The symbols are coded in blocks that grow by a quarter; the frequencies of a block
are the counts of all blocks before it, smoothed over neighbouring values (weights have smooth histograms, so a count
at 17 says something about 16 and 18). This learns as an adaptive coder does, and runs as fast as a static one.
"""

from __future__ import annotations

from collections.abc import Iterator

import constriction
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

RAW, CONSTANT, CODED = 0, 1, 2  # the first byte of a stream; CODED + i uses SMOOTHING[i]
# (weight of one count, kernel half-width): one count adds `weight` times a triangle of that half-width.
# The first is the Krichevsky-Trofimov estimator, the second trusts counts more: right when few values occur.
SMOOTHING = ((2, 0), (32, 0), (16, 1), (8, 2), (4, 4), (2, 8), (1, 16))
PRECISION = 24
LONGEST = 1 << 30  # symbols of one coded stream: keeps every product in `shares` within 63 bits
_FIRST_BLOCK = 32


def encode(data: Bytes) -> bytes:
    """The shortest of the forms that `decode` reads. Deterministic.

    Args:
        data: (n,) bytes.
    """
    raw = bytes([RAW]) + data.tobytes()
    if len(data) < 3 or len(data) > LONGEST:
        return raw
    low, high = int(data.min()), int(data.max())
    if low == high:
        return bytes([CONSTANT, low])
    parts, known = _blocks_of(data, low, high)
    head = bytes([low, high])
    best = min(raw, _encode(parts, known, 0, head), key=len)
    if len(best) < 0.99 * len(raw) or len(data) < 4096:  # noise stays noise whatever the smoothing: do not try on
        # Over more values than there are, counts are smoothed into nothing.
        for smoothing in (i for i, (_, width) in enumerate(SMOOTHING) if i and width <= high - low):
            best = min(best, _encode(parts, known, smoothing, head), key=len)
    return best


def decode(stream: bytes, count: int) -> Bytes:
    """The `count` bytes that a stream holds.

    Raises:
        ValueError: when the stream cannot be one of ours; says why. Memory used is some bytes per symbol.
    """
    if not stream:
        raise ValueError("a stream is empty")
    kind, body = stream[0], stream[1:]
    if kind == RAW:
        if len(body) != count:
            raise ValueError(f"a raw stream holds {len(body)} bytes, not the {count} declared")
        return np.frombuffer(body, np.uint8)
    if kind == CONSTANT:
        if len(body) != 1:
            raise ValueError(f"a constant stream holds {len(body)} bytes, not 1")
        return np.full(count, body[0], np.uint8)
    if kind - CODED >= len(SMOOTHING):
        raise ValueError(f"a stream is of kind {kind}, known are 0 to {CODED + len(SMOOTHING) - 1}")
    if len(body) < 6 or len(body) % 4 != 2 or body[0] >= body[1] or count > LONGEST:
        raise ValueError("a coded stream is malformed")
    return _decode(body[2:], body[0], body[1], kind - CODED, count)


def blocks(count: int) -> Iterator[slice]:
    """The blocks in which `count` symbols are coded: 32 symbols, then a quarter of what came before, at least 32."""
    start = 0
    while start < count:
        stop = min(count, start + max(_FIRST_BLOCK, start // 4))
        yield slice(start, stop)
        start = stop


def smoothed(counts: Ints, smoothing: int) -> Ints:
    """(rows, n) what counts add to the weights of a model: each a triangle over neighbouring values.

    At most 2**30 counts, each adding at most 289, times 2**24 stays under 2**63.
    """
    weight, width = SMOOTHING[smoothing]
    if width:
        rows, n = counts.shape
        apart = np.zeros((rows, n + 2 * width), np.int64)  # so that rows one after another do not mix
        apart[:, width : width + n] = counts
        triangle = width + 1 - np.abs(np.arange(-width, width + 1))
        counts = np.convolve(apart.reshape(-1), triangle, "same").reshape(apart.shape)[:, width:-width]
    return counts * weight


def shares(weights: Ints, left: Ints | int) -> Ints:
    """(m, n) in proportion to the weights, which are used up; each row of sum `left`, the first of the largest gets
    what is missing. With 2**24 - n for `left` these are frequencies less 1."""
    sums = np.add.reduce(weights, 1, keepdims=True)
    weights *= left
    weights //= sums
    missing = left - np.add.reduce(weights, 1, keepdims=True)
    weights.reshape(-1)[weights.argmax(1) + np.arange(0, weights.size, weights.shape[1])] += missing[:, 0]
    return weights


def _shares_of_one(weights: Ints, left: int) -> Ints:
    """`shares` of one row (n,), kept as it is, in half the time."""
    found = weights * left
    found //= int(np.add.reduce(weights))
    found[found.argmax()] += left - int(np.add.reduce(found))
    return found


def categorical(table: Ints) -> constriction.stream.model.Categorical:
    """The coder's model of frequencies less 1, which is what it wants to be told: it gives each symbol 1/2**24 and
    shares the rest in proportion to what it is handed, here exactly that rest."""
    return constriction.stream.model.Categorical(table.astype(np.float64), perfect=False)


def _blocks_of(data: Bytes, low: int, high: int) -> tuple[list[NDArray[np.int32]], Ints]:
    """The symbols of each block, and (blocks, n) how often each came before it."""
    symbols = data.astype(np.int32) - low
    parts = [symbols[block] for block in blocks(len(symbols))]
    counts = np.array([np.bincount(part, minlength=high - low + 1) for part in parts])
    return parts, np.cumsum(counts, axis=0) - counts


def _encode(parts: list[NDArray[np.int32]], known: Ints, smoothing: int, head: bytes) -> bytes:
    """A coded stream of the symbols of blocks, by what was counted before each of them."""
    coder = constriction.stream.stack.AnsCoder()
    table = shares(1 + smoothed(known, smoothing), (1 << PRECISION) - known.shape[1])
    for part, row in zip(reversed(parts), table[::-1], strict=True):
        coder.encode_reverse(part, categorical(row))  # ANS is a stack: what is pushed last comes out first
    return bytes([CODED + smoothing]) + head + coder.get_compressed().astype("<u4").tobytes()


def _decode(words: bytes, low: int, high: int, smoothing: int, count: int) -> Bytes:
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(words, "<u4").astype(np.uint32))
    size = high - low + 1
    weights = np.ones(size, np.int64)
    symbols = np.empty(count, np.uint8)
    for block in blocks(count):
        model = categorical(_shares_of_one(weights, (1 << PRECISION) - size))
        found = coder.decode(model, block.stop - block.start)
        weights += smoothed(np.bincount(found, minlength=size)[None], smoothing)[0]
        symbols[block] = found + low
    if not coder.is_empty():
        raise ValueError("a coded stream holds more than its symbols")
    return symbols
