"""Small whole numbers of convolution kernels, each foretold from those of its kernel that are known.

Neighbours in a trained kernel are alike in sign and size (correlations of 0.3 to 0.8 in the CIFAR ResNets), which
contexts of magnitudes alone cannot use. So the positions of a kernel are coded in phases, the centre first and then
what lies between, as an interlaced picture is; a linear predictor with a few stored coefficients foretells the
numbers of a phase, and the model of a number is chosen by how large its surroundings are and by how large the forecast
is beside that. The sign of the forecast is taken out, so that both signs learn together.

A phase is an array: contexts come from NumPy, the coder takes all numbers of a context in one call. Everything that the
decoder computes is in integers (a float32 product of matrices where every sum is a whole number below 2**24).
docs/format.md, "Predicted numbers", gives it step by step.

Sources: interlacing as in PNG; magnitude contexts as in DeepCABAC (Wiedemann et al., arXiv:1907.11900), which predicts
nothing; ANS by `constriction` (Bamler, arXiv:2201.01741).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from tersenet.codec.contexts import CONTEXTS, LIMIT, STRENGTHS, UNIT, log16, log16_of_one, power4
from tersenet.codec.entropy import PRECISION
from tersenet.codec.forecasts import LARGEST as LARGEST_COEFFICIENT
from tersenet.codec.forecasts import fitted, flat, unflat, worth
from tersenet.codec.phases import Phase, blocks, kernel, phases

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Keys = NDArray[np.uint8]
Signs = NDArray[np.uint32]
Categorical = constriction.stream.model.Categorical

HEAD = struct.Struct("<BBBB")  # reach, start, strength, distance
DISTANCES = (0, 1, 2)
LEVELS = (0, 3, 6, 10, 16, 28)  # forecasts, in eighths of the scale of the context
_EDGES = (2, 4, 8, 13, 22)  # between them
_CAP = 511
_COUNT = 64
KEYS = CONTEXTS * len(LEVELS)
_COEFFICIENT_CONTEXT = 28  # the model of coefficients: a mean magnitude of a quarter
_FAMILY = Categorical(perfect=False)


class Field:
    """Numbers laid out as (K positions in the order of coding, O rows, G kernels), as far as they are known."""

    def __init__(self, shape: tuple[int, ...], reach: int, start: int, distance: int) -> None:
        size = kernel(shape)
        assert size is not None
        self.rows, self.groups = shape[0], shape[1]
        self.reach, self.start, self.shift = reach, start, max(0, reach.bit_length() - 4)
        self.phases = phases(*size, distance)
        self.planes = np.zeros((size[0] * size[1], self.rows, self.groups), np.float32)
        self.sums = np.zeros((self.rows, self.groups), np.float32)
        self.row_sums = np.zeros(self.rows, np.int64)
        self.group_sums = np.zeros(self.groups, np.int64)
        self.total = 0
        self.levels = _levels(self.shift)

    def keys(self, phase: Phase, first: int, stop: int, coefficients: Floats | None) -> tuple[Keys, Signs | None]:
        """(P, rows, G) contexts of a block, and the signs of its forecasts: the highest bit where they are negative."""
        size, before = len(phase.positions), phase.before
        count = (before * self.rows + first * size) * self.groups
        mean = max(1, (UNIT * self.total + 16 * power4(self.start)) // (count + 16))
        sums = np.concatenate([self.group_sums, self.row_sums[first:stop]])
        sums *= UNIT
        sums += 8 * mean
        sums[: self.groups] //= before * self.rows + first * size + 8
        sums[: self.groups] += 1
        logs = log16(sums)
        logs[: self.groups] += 2 - log16_of_one((before * self.groups + 8) * mean)
        quarters = (logs[self.groups :, None] + logs[: self.groups]) >> 2
        np.maximum(quarters, 0, out=quarters)
        np.minimum(quarters, 2 * CONTEXTS - 1, out=quarters)
        if before:
            quarters <<= 8
            quarters += self._shifted(self.sums[first:stop].copy(), LIMIT)
        context = _scales(before, self.shift).take(quarters)  # (rows, G), times _CAP + 1
        if coefficients is None:
            keys = self.levels.take(context)
            return np.repeat(keys[None], size, axis=0), None
        forecast = coefficients @ self.planes[:before, first:stop].reshape(before, -1)  # (P, rows * G), in sixteenths
        forecast += 0.0  # -0.0 is not negative
        signs = forecast.view(np.uint32) & np.uint32(1 << 31)
        np.abs(forecast, out=forecast)
        at = self._shifted(forecast, _CAP).reshape(size, *context.shape)
        at += context
        return self.levels.take(at), signs.reshape(at.shape)

    def _shifted(self, values: Floats, most: int) -> Ints:
        """Whole numbers, shifted to the right and at most `most`; `values` is used up."""
        if self.shift:
            values *= np.float32(1 / (1 << self.shift))
        np.minimum(values, np.float32(most), out=values)
        return values.astype(np.int64)

    def put(self, phase: Phase, first: int, stop: int, values: Floats) -> None:
        """Takes in a block's (P, rows, G) numbers."""
        self.planes[phase.before : phase.stop, first:stop] = values
        if phase.stop == len(self.planes):
            return  # nothing comes after that would ask
        magnitudes = np.abs(values).sum(0)
        self.sums[first:stop] += magnitudes
        rows = magnitudes.sum(1, dtype=np.float64)
        self.row_sums[first:stop] += rows.astype(np.int64)
        self.group_sums += magnitudes.sum(0, dtype=np.float64).astype(np.int64)
        self.total += int(rows.sum())

    def numbers(self) -> NDArray[np.int32]:
        """(n,) all of them, row-major."""
        return self.in_rows(self.planes.astype(np.int32))

    def in_rows(self, planes: NDArray[Any]) -> NDArray[Any]:
        """(K, O, G) in the order of coding -> (n,) row-major."""
        order = [position for phase in self.phases for position in phase.positions]
        out = np.empty((self.rows * self.groups, len(order)), planes.dtype)
        out[:, order] = planes.reshape(len(order), -1).T
        return out.reshape(-1)


@lru_cache(maxsize=256)
def _scales(before: int, shift: int) -> Ints:
    """512 times the context by foretold mean (quarter octaves) and, where numbers are known, 256 sums of these."""
    quarters = np.arange(2 * CONTEXTS, dtype=np.int64)
    if not before:
        return (((quarters + 1) >> 1).clip(0, CONTEXTS - 1) * (_CAP + 1)).astype(np.int64)
    means = np.array([power4(int(j)) for j in quarters], np.int64)
    sums = np.arange(LIMIT + 1, dtype=np.int64) << shift
    logs = log16((UNIT * sums[None, :] + 6 * means[:, None]) // (before + 6))
    return (((logs + 4) >> 3).clip(0, CONTEXTS - 1) * (_CAP + 1)).astype(np.int64).reshape(-1)


@lru_cache(maxsize=16)
def _levels(shift: int) -> Keys:
    """(CONTEXTS * 512,) the key of a context (512 times it) and a forecast's magnitude."""
    units = np.array([_unit(context, shift) for context in range(CONTEXTS)], np.int64)
    forecasts = 8 * np.arange(_CAP + 1, dtype=np.int64)
    level = sum((forecasts >= edge * units[:, None]).astype(np.int64) for edge in _EDGES)
    return (np.arange(CONTEXTS)[:, None] * len(LEVELS) + level).astype(np.uint8).reshape(-1)


def _unit(context: int, shift: int) -> int:
    """The scale of a context in sixteenths, shifted."""
    return max(5, power4(2 * context) >> (8 + shift))


def starting_weights(context: int, reach: int, strength: int) -> Ints:
    """(levels, 2 reach + 1) what the models of a context start with, 64 for a count.

    x -> (b + |x - centre|) exp(-|x - centre| / b), summed over four points of each step.
    """
    shift = max(0, reach.bit_length() - 4)
    steps = 16 * np.arange(-reach, reach + 1, dtype=np.int64)[:, None] + np.array((-6, -2, 2, 6))
    scale = max(128, power4(2 * context))
    centres = (np.array(LEVELS, np.int64) * _unit(context, shift) >> 3) << shift
    away = np.abs(steps - centres[:, None, None])  # (levels, n, 4)
    octaves = away * (580905600 // scale) >> 12  # 256ths
    density = ((scale + 384 * away) * (((512 - (octaves & 255)) << 4) >> np.minimum(octaves >> 8, 40))).sum(2)
    out = 1 + density * (_COUNT * STRENGTHS[strength]) // np.maximum(1, density.sum(1, keepdims=True))
    out.setflags(write=False)
    return out


# Kept apart, so that a file with every reach there is does not fill the memory: 3 MB and 2 MB at most.
_of_small = lru_cache(maxsize=1024)(starting_weights)
_of_large = lru_cache(maxsize=64)(starting_weights)


class Models:
    """A table of weights per key, made when its context is first asked for; each learns from what it coded."""

    def __init__(self, reach: int, strength: int) -> None:
        self.reach, self.strength = reach, strength
        self.weights = np.zeros((KEYS, 2 * reach + 1), np.int64)
        self.made: set[int] = set()

    def shares(self, keys: Ints) -> Ints:
        """(len(keys), n) frequencies less 1."""
        size = len(LEVELS)
        for context in set((keys // size).tolist()) - self.made:
            made = (_of_small if self.reach < 32 else _of_large)(context, self.reach, self.strength)
            self.weights[context * size : (context + 1) * size] = made
            self.made.add(context)
        return shares(self.weights[keys])

    def learn(self, keys: Ints, sizes: Ints, symbols: NDArray[np.int32]) -> None:
        """Takes in symbols, `sizes` of each key in turn."""
        width = self.weights.shape[1]
        cells = np.repeat(np.arange(len(keys)) * width, sizes) + symbols
        counts = np.bincount(cells, minlength=len(keys) * width).reshape(len(keys), width)
        self.weights[keys] += _COUNT * counts


def shares(weights: Ints) -> Ints:
    """(m, n) in proportion to the weights, of sum 2**24 - n; the largest gets what is missing. These are the
    frequencies less 1, which is what the coder wants to be told."""
    left = (1 << PRECISION) - weights.shape[1]
    out = weights * left // weights.sum(1, keepdims=True)
    out[np.arange(len(out)), out.argmax(1)] += left - out.sum(1)
    return out


def _sorted(keys: Keys) -> tuple[Ints, Ints, Ints]:
    """The places of a block in order of key, the keys that come, and how often."""
    counts = np.bincount(keys, minlength=KEYS)
    present = np.flatnonzero(counts)
    return np.argsort(keys, kind="stable"), present, counts[present]


def _together(sizes: Ints, width: int) -> bool:
    """Whether one call with a table per number is faster than one per key; both code the same."""
    return int(sizes.sum()) * (2 + 2.5 * width) < 1500 * len(sizes)


def encode(q: NDArray[np.int32], shape: tuple[int, ...], strength: int, distance: int | None = None) -> bytes:
    """What `decode` reads: reach, start, strength, distance (a byte each), the coder's words.

    Args:
        q: (n,) numbers of at most LIMIT in magnitude, not all 0; row-major, of a tensor of `shape` with kernels.
        strength: of the starting models, an index into STRENGTHS.
        distance: of DISTANCES, how far forecasts look; by default 1, or 0 where coefficients would cost more than they
            save.
    """
    field, planes, coefficients = _laid_out(q, shape, 1 if distance is None else distance)
    if distance is None:
        distance = 1 if worth(planes, field.phases, coefficients) else 0
        if not distance:
            field, planes, coefficients = _laid_out(q, shape, 0)
    reach = field.reach
    models = Models(reach, strength)
    last = (len(field.planes), field.rows)
    jobs = []
    for phase, first, stop in blocks(field.rows, field.groups, field.phases):
        values = planes[phase.before : phase.stop, first:stop]
        keys, signs = field.keys(phase, first, stop, coefficients[phase.before])
        at, present, sizes = _sorted(keys.reshape(-1))
        facing = values if signs is None else (values.view(np.uint32) ^ signs).view(np.float32)
        symbols = facing.reshape(-1).take(at).astype(np.int32) + reach
        jobs.append((symbols, models.shares(present), sizes))
        if (phase.stop, stop) != last:
            models.learn(present, sizes, symbols)
        field.put(phase, first, stop, values)
    coder = constriction.stream.stack.AnsCoder()
    for symbols, table, sizes in reversed(jobs):  # ANS is a stack: what is pushed last comes out first
        if _together(sizes, table.shape[1]):
            coder.encode_reverse(symbols, _FAMILY, np.repeat(table.astype(np.float32), sizes, axis=0))
            continue
        end = len(symbols)
        for row, count in zip(table.astype(np.float64)[::-1], sizes[::-1].tolist(), strict=True):
            coder.encode_reverse(symbols[end - count : end], Categorical(row, perfect=False))
            end -= count
    stored = flat(coefficients, field.phases)
    if len(stored):
        coder.encode_reverse(stored + LARGEST_COEFFICIENT, _coefficient_model())
    return HEAD.pack(reach, field.start, strength, distance) + coder.get_compressed().astype("<u4").tobytes()


def decode(stream: bytes, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """The (n,) numbers of a tensor of `shape`.

    Raises:
        ValueError: when the stream cannot be one of ours; says why.
    """
    if len(stream) < HEAD.size or (len(stream) - HEAD.size) % 4:
        raise ValueError(f"a predicted stream has {len(stream)} bytes, which is no length of one")
    reach, start, strength, distance = HEAD.unpack_from(stream)
    if not reach or start >= 2 * CONTEXTS or strength >= len(STRENGTHS) or distance not in DISTANCES:
        raise ValueError(f"a predicted stream starts with {reach}, {start}, {strength}, {distance}: not allowed")
    if kernel(shape) is None:
        raise ValueError(f"a tensor of {list(shape)} has no kernels to predict")
    field = Field(shape, reach, start, distance)
    models = Models(reach, strength)
    last = (len(field.planes), field.rows)
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(stream, "<u4", offset=HEAD.size).astype(np.uint32))
    coefficients = _decode_coefficients(coder, field.phases)
    for phase, first, stop in blocks(field.rows, field.groups, field.phases):
        keys, signs = field.keys(phase, first, stop, coefficients[phase.before])
        at, present, sizes = _sorted(keys.reshape(-1))
        symbols = _taken(coder, models.shares(present), sizes)
        if (phase.stop, stop) != last:
            models.learn(present, sizes, symbols)
        values = np.empty(keys.shape, np.float32)
        values.reshape(-1)[at] = symbols - reach
        if signs is not None:
            flipped = values.view(np.uint32)
            flipped ^= signs
        field.put(phase, first, stop, values)
    if not coder.is_empty():
        raise ValueError("a predicted stream holds more than its numbers")
    return field.numbers()


def _taken(coder: constriction.stream.stack.AnsCoder, table: Ints, sizes: Ints) -> NDArray[np.int32]:
    """The next symbols, `sizes` of each row of the table in turn."""
    if _together(sizes, table.shape[1]):
        return coder.decode(_FAMILY, np.repeat(table.astype(np.float32), sizes, axis=0))
    runs = zip(table.astype(np.float64), sizes.tolist(), strict=True)
    return np.concatenate([coder.decode(Categorical(row, perfect=False), count) for row, count in runs])


def keys_of(q: NDArray[np.int32], shape: tuple[int, ...]) -> tuple[Keys, NDArray[np.int32]]:
    """(n,) the context of each number, and the sign of its forecast (1 or -1), as `encode` has them at distance 1."""
    field, planes, coefficients = _laid_out(q, shape, 1)
    keys, negative = np.empty(planes.shape, np.uint8), np.zeros(planes.shape, np.uint32)
    for phase, first, stop in blocks(field.rows, field.groups, field.phases):
        inside = (slice(phase.before, phase.stop), slice(first, stop))
        keys[inside], signs = field.keys(phase, first, stop, coefficients[phase.before])
        if signs is not None:
            negative[inside] = signs
        field.put(phase, first, stop, planes[inside])
    return field.in_rows(keys), 1 - 2 * field.in_rows(negative >> 31).astype(np.int32)


def _laid_out(
    q: NDArray[np.int32], shape: tuple[int, ...], distance: int
) -> tuple[Field, Floats, dict[int, Floats | None]]:
    """An empty field, the numbers in its layout, and the coefficients that fit them."""
    magnitudes = np.abs(q)
    start = log16_of_one(max(1, UNIT * int(magnitudes.sum(dtype=np.int64)) // len(q))) >> 2
    field = Field(shape, int(magnitudes.max()), start, distance)
    order = [position for phase in field.phases for position in phase.positions]
    planes = q.reshape(-1, len(order)).T[order].astype(np.float32, order="C")  # (K, O * G)
    return field, planes.reshape(field.planes.shape), fitted(planes, field.phases)


@lru_cache(maxsize=1)
def _coefficient_model() -> Any:
    weights = starting_weights(_COEFFICIENT_CONTEXT, LARGEST_COEFFICIENT, len(STRENGTHS) - 1)[0]
    return Categorical(shares(weights[None])[0].astype(np.float64), perfect=False)


def _decode_coefficients(coder: constriction.stream.stack.AnsCoder, plan: Sequence[Phase]) -> dict[int, Floats | None]:
    count = sum(len(sources) for phase in plan for sources in phase.sources)
    return unflat(coder.decode(_coefficient_model(), count) - LARGEST_COEFFICIENT if count else np.empty(0), plan)
