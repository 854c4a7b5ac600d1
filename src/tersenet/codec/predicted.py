"""Small whole numbers of convolution kernels, each foretold from those of its kernel that are known.

Neighbours in a trained kernel are alike in sign and size (correlations of 0.3 to 0.8 in the CIFAR ResNets), which
contexts of magnitudes alone cannot use. So the positions of a kernel are coded in phases, the centre first and then
what lies between, as an interlaced picture is; a linear predictor with a few stored coefficients foretells the
numbers of a phase, and the model of a number is chosen by how large its surroundings are and by how large the forecast
is beside that. The sign of the forecast is taken out, so that both signs learn together.

A phase is an array: contexts come from NumPy, the coder takes all numbers of a context in one call. Tensors of one
shape are decoded side by side. Everything that the decoder computes is in integers (a float32 product of matrices where
every sum is a whole number below 2**24).
docs/format.md, "Predicted numbers", gives it step by step.

Sources: interlacing as in PNG; magnitude contexts as in DeepCABAC (Wiedemann et al., arXiv:1907.11900), which predicts
nothing; ANS by `constriction` (Bamler, arXiv:2201.01741).
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tersenet.codec import adaptive
from tersenet.codec.contexts import CONTEXTS, LIMIT, STRENGTHS, UNIT, log16, power4, start_of
from tersenet.codec.entropy import PRECISION, categorical, shares
from tersenet.codec.forecasts import LARGEST as LARGEST_COEFFICIENT
from tersenet.codec.forecasts import fitted, flat, unflat, worth
from tersenet.codec.phases import Phase, blocks, kernel, phases

Ints = NDArray[np.int64]
Numbers = NDArray[np.int32]
Floats = NDArray[np.float32]
Keys = NDArray[np.uint8]
Signs = NDArray[np.uint32]

HEAD = struct.Struct("<BBBB")  # reach, start, strength, distance
DISTANCES = (0, 1, 2)
LEVELS = (0, 3, 6, 10, 16, 28)  # forecasts, in eighths of the scale of the context
_EDGES = (2, 4, 8, 13, 22)  # between them
_CAP = 511
KEYS = CONTEXTS * len(LEVELS)
SHIFTS = 5  # 0 to 4, of magnitudes up to LIMIT
_NARROW = 31  # magnitudes up to which tensors are decoded side by side whatever their own
_COEFFICIENT_CONTEXT = 28  # the model of coefficients: a mean magnitude of a quarter
_Header = tuple[int, int, int, int]


class Field:
    """Numbers of T tensors laid out as (T, K positions in the order of coding, O rows, G kernels), as far as known."""

    def __init__(self, shape: tuple[int, ...], reaches: Sequence[int], starts: Sequence[int], distance: int) -> None:
        size, tensors = kernel(shape), len(reaches)
        assert size is not None
        self.reaches, self.starts = reaches, starts
        self.rows, self.groups = shape[0], shape[1]
        self.shift = np.array([shift_of(reach) for reach in reaches], np.int64)[:, None, None]
        self.phases = phases(*size, distance)
        self.planes = np.zeros((tensors, size[0] * size[1], self.rows, self.groups), np.float32)
        self.sums = np.zeros((tensors, self.rows, self.groups), np.float32)
        self.row_sums = np.zeros((tensors, self.rows), np.int64)
        self.group_sums = np.zeros((tensors, self.groups), np.int64)
        self.total = np.zeros(tensors, np.int64)
        self.supposed = np.array([16 * power4(start) for start in starts], np.int64)

    def keys(self, phase: Phase, first: int, stop: int, coefficients: Floats | None) -> tuple[Keys, Signs | None]:
        """(T, P, rows, G) contexts of a block, and the signs of its forecasts: the highest bit where they are negative.

        Args:
            coefficients: (T, P, known positions), None where nothing is foretold.
        """
        size, before, groups = len(phase.positions), phase.before, self.groups
        count = (before * self.rows + first * size) * groups
        mean = np.maximum(1, (UNIT * self.total + self.supposed) // (count + 16))[:, None]
        sums = np.concatenate([self.group_sums, self.row_sums[:, first:stop], (before * groups + 8) * mean], 1)
        sums[:, :-1] *= UNIT
        sums[:, :-1] += 8 * mean
        sums[:, :groups] //= before * self.rows + first * size + 8
        sums[:, :groups] += 1
        logs = log16(sums)
        logs[:, :groups] -= logs[:, -1:] - 2
        quarters = logs[:, groups:-1, None] + logs[:, None, :groups]
        quarters >>= 2
        np.maximum(quarters, 0, out=quarters)
        np.minimum(quarters, 2 * CONTEXTS - 1, out=quarters)
        scales = _scales(before)
        if before:
            quarters <<= 8
            quarters += self._shifted(self.sums[:, first:stop].copy(), LIMIT).astype(np.int64)
        quarters += self.shift * (scales.size // SHIFTS)
        context = scales.take(quarters)  # (T, rows, G), times _CAP + 1
        levels = _levels()
        if coefficients is None:
            return np.repeat(levels.take(context.astype(np.int64))[:, None], size, axis=1), None
        known = self.planes[:, :before, first:stop].reshape(len(self.planes), before, -1)
        forecast = coefficients @ known  # (T, P, rows * G), in sixteenths
        forecast += 0.0  # -0.0 is not negative
        forecast = forecast.reshape(len(context), size, *context.shape[1:])
        signs = forecast.view(np.uint32) & np.uint32(1 << 31)
        at = self._shifted(np.abs(forecast, out=forecast).reshape(len(context), size, -1), _CAP).reshape(signs.shape)
        at += context[:, None]
        return levels.take(at.astype(np.int64)), signs

    def _shifted(self, values: Floats, most: int) -> Floats:
        """(T, ., .) whole numbers, shifted to the right (with what that leaves behind the point) and at most `most`;
        `values` is used up."""
        if self.shift.any():
            values *= np.ldexp(np.float32(1), -self.shift)
        return np.minimum(values, np.float32(most), out=values)

    def put(self, phase: Phase, first: int, stop: int, values: Floats) -> None:
        """Takes in a block's (T, P, rows, G) numbers."""
        self.planes[:, phase.before : phase.stop, first:stop] = values
        if phase.stop == self.planes.shape[1]:
            return  # nothing comes after that would ask
        magnitudes = np.add.reduce(np.abs(values), 1)
        self.sums[:, first:stop] += magnitudes
        rows = np.add.reduce(magnitudes, 2, dtype=np.float64).astype(np.int64)
        self.row_sums[:, first:stop] += rows
        self.group_sums += np.add.reduce(magnitudes, 1, dtype=np.float64).astype(np.int64)
        self.total += np.add.reduce(rows, 1)

    def numbers(self, tensor: int) -> Numbers:
        """(n,) all of one tensor, row-major."""
        return self.in_rows(self.planes[tensor], np.int32)

    def in_rows(self, planes: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
        """(K, O, G) in the order of coding -> (n,) row-major, as another type."""
        order = np.argsort([position for phase in self.phases for position in phase.positions])
        return planes.reshape(len(order), -1).take(order, axis=0).T.astype(dtype, order="C").reshape(-1)


def shift_of(reach: int) -> int:
    """By how many bits magnitudes up to `reach` are shifted before they are looked up."""
    return max(0, reach.bit_length() - 4)


@lru_cache(maxsize=256)
def _scales(before: int) -> Floats:
    """512 times the context, more by CONTEXTS of them for each shift, by shift, foretold mean (quarter octaves) and,
    where numbers are known, 256 sums of these."""
    quarters = np.arange(2 * CONTEXTS, dtype=np.int64)
    rows = []
    for shift in range(SHIFTS):
        context = (quarters + 1) >> 1
        if before:
            means = np.array([power4(int(j)) for j in quarters], np.int64)
            sums = np.arange(LIMIT + 1, dtype=np.int64) << shift
            context = (log16((UNIT * sums[None, :] + 6 * means[:, None]) // (before + 6)) + 4) >> 3
        rows.append(((context.clip(0, CONTEXTS - 1) + CONTEXTS * shift) * (_CAP + 1)).astype(np.float32).reshape(-1))
    return np.concatenate(rows)


@lru_cache(maxsize=1)
def _levels() -> Keys:
    """(SHIFTS * CONTEXTS * 512,) the key by shift, context and a forecast's magnitude."""
    rows = []
    for shift in range(SHIFTS):
        units = np.array([_unit(context, shift) for context in range(CONTEXTS)], np.int64)
        forecasts = 8 * np.arange(_CAP + 1, dtype=np.int64)
        level = sum((forecasts >= edge * units[:, None]).astype(np.int64) for edge in _EDGES)
        rows.append((np.arange(CONTEXTS)[:, None] * len(LEVELS) + level).astype(np.uint8).reshape(-1))
    return np.concatenate(rows)


def _unit(context: int, shift: int) -> int:
    """The scale of a context in sixteenths, shifted."""
    return max(5, power4(2 * context) >> (8 + shift))


def starting_weights(context: int, reach: int, strength: int) -> Ints:
    """(levels, 2 reach + 1) what the models of a context start with, 64 for a count.

    x -> (b + |x - centre|) exp(-|x - centre| / b), summed over four points of each step.
    """
    shift = shift_of(reach)
    steps = 16 * np.arange(-reach, reach + 1, dtype=np.int64)[:, None] + np.array((-6, -2, 2, 6))
    scale = max(128, power4(2 * context))
    centres = (np.array(LEVELS, np.int64) * _unit(context, shift) >> 3) << shift
    away = np.abs(steps - centres[:, None, None])  # (levels, n, 4)
    octaves = away * (580905600 // scale) >> 12  # 256ths
    density = ((scale + 384 * away) * (((512 - (octaves & 255)) << 4) >> np.minimum(octaves >> 8, 40))).sum(2)
    out = 1 + density * (adaptive.COUNT * STRENGTHS[strength]) // np.maximum(1, density.sum(1, keepdims=True))
    out.setflags(write=False)
    return out


# Kept apart, so that a file with every reach there is does not fill the memory: 3 MB and 2 MB at most.
_of_small = lru_cache(maxsize=1024)(starting_weights)
_of_large = lru_cache(maxsize=64)(starting_weights)


def _models(reaches: Sequence[int], strengths: Sequence[int]) -> adaptive.Models:
    def start(tensor: int, context: int) -> Ints:
        reach = reaches[tensor]
        return (_of_small if reach < 32 else _of_large)(context, reach, strengths[tensor])

    return adaptive.Models(KEYS, [-reach for reach in reaches], reaches, start, made=len(LEVELS))


def encode(q: Numbers, shape: tuple[int, ...], strengths: Sequence[int], distance: int | None = None) -> bytes:
    """What `decode` reads, the shortest: reach, start, strength, distance (a byte each), the coder's words.

    Args:
        q: (n,) numbers of at most LIMIT in magnitude, not all 0; row-major, of a tensor of `shape` with kernels.
        strengths: of the starting models, indices into STRENGTHS; each is tried.
        distance: of DISTANCES, how far forecasts look; by default 1, or 0 where coefficients would cost more than they
            save.
    """
    field, planes, coefficients = _laid_out(q, shape, 1 if distance is None else distance)
    if distance is None:
        distance = 1 if worth(planes, field.phases, coefficients) else 0
        if not distance:
            field, planes, coefficients = _laid_out(q, shape, 0)
    reach, start = field.reaches[0], field.starts[0]
    tables = [_models([reach], [strength]) for strength in strengths]
    jobs: list[list[adaptive.Job]] = [[] for _ in strengths]
    for phase, first, stop, is_last in _blocks(field):
        values = planes[phase.before : phase.stop, first:stop]
        keys, signs = field.keys(phase, first, stop, _of_one(coefficients[phase.before]))
        at, present, sizes = adaptive.in_order(keys, KEYS)
        facing = values[None] if signs is None else (values.view(np.uint32) ^ signs).view(np.float32)
        numbers = facing.reshape(-1).take(at).astype(np.int32)
        for each, its in zip(tables, jobs, strict=True):
            its.append((numbers + reach, each.shares(present), sizes))
            if not is_last:
                each.learn(present, sizes, numbers)
        field.put(phase, first, stop, values[None])
    stored = flat(coefficients, field.phases)
    before = [(stored + LARGEST_COEFFICIENT, _coefficient_model())] if len(stored) else []
    coded = [
        HEAD.pack(reach, start, strength, distance) + adaptive.encoded(its, before)
        for strength, its in zip(strengths, jobs, strict=True)
    ]
    return min(coded, key=len)


def alike(stream: bytes, shape: tuple[int, ...]) -> Hashable:
    """Streams that give the same here can be decoded side by side.

    Raises:
        ValueError: when the stream cannot be one of ours; says why.
    """
    reach, _, _, distance = _header(stream, shape)
    return distance, _widest(reach)


def side_by_side(stream: bytes, shape: tuple[int, ...]) -> int:
    """How many streams like this one to decode at a time."""
    reach, _, _, distance = _header(stream, shape)
    size = kernel(shape)
    assert size is not None
    largest = max(len(phase.positions) for phase in phases(*size, distance)) * shape[0] * shape[1]
    return adaptive.side_by_side(KEYS, 2 * _widest(reach) + 1, largest)


def decode(streams: Sequence[bytes], shape: tuple[int, ...]) -> list[Numbers]:
    """The (n,) numbers of tensors of one shape, whose streams are `alike`.

    Raises:
        ValueError: when a stream cannot be one of ours; says why.
    """
    heads = [_header(stream, shape) for stream in streams]
    reaches, starts, strengths, _ = map(list, zip(*heads, strict=True))
    field = Field(shape, reaches, starts, heads[0][3])
    tables = _models(reaches, strengths)
    coders = [adaptive.opened(stream, HEAD.size) for stream in streams]
    found = [_decode_coefficients(coder, field.phases) for coder in coders]
    for phase, first, stop, is_last in _blocks(field):
        each = [coefficients[phase.before] for coefficients in found]
        keys, signs = field.keys(phase, first, stop, None if each[0] is None else np.stack(each))  # type: ignore[arg-type]
        at, present, sizes = adaptive.in_order(keys, KEYS)
        numbers = tables.take(coders, present, sizes)
        if not is_last:
            tables.learn(present, sizes, numbers)
        values = np.empty(keys.shape, np.float32)
        values.reshape(-1)[at] = numbers
        if signs is not None:
            flipped = values.view(np.uint32)
            flipped ^= signs
        field.put(phase, first, stop, values)
    if not all(coder.is_empty() for coder in coders):
        raise ValueError("a predicted stream holds more than its numbers")
    return [field.numbers(tensor) for tensor in range(len(streams))]


def _widest(reach: int) -> int:
    """The largest magnitude of what may go side by side with a tensor."""
    return max(_NARROW, (1 << reach.bit_length()) - 1)


def _header(stream: bytes, shape: tuple[int, ...]) -> _Header:
    if len(stream) < HEAD.size or (len(stream) - HEAD.size) % 4:
        raise ValueError(f"a predicted stream has {len(stream)} bytes, which is no length of one")
    reach, start, strength, distance = HEAD.unpack_from(stream)
    if not reach or start >= 2 * CONTEXTS or strength >= len(STRENGTHS) or distance not in DISTANCES:
        raise ValueError(f"a predicted stream starts with {reach}, {start}, {strength}, {distance}: not allowed")
    if kernel(shape) is None:
        raise ValueError(f"a tensor of {list(shape)} has no kernels to predict")
    return reach, start, strength, distance


def _blocks(field: Field) -> Iterator[tuple[Phase, int, int, bool]]:
    """(phase, first row, row after the last, whether it is the last block)."""
    for phase, first, stop in blocks(field.rows, field.groups, field.phases):
        yield phase, first, stop, (phase.stop, stop) == (field.planes.shape[1], field.rows)


def keys_of(q: Numbers, shape: tuple[int, ...]) -> tuple[Keys, Numbers]:
    """(n,) the context of each number, and the sign of its forecast (1 or -1), as `encode` has them at distance 1."""
    field, planes, coefficients = _laid_out(q, shape, 1)
    keys, negative = np.empty(planes.shape, np.uint8), np.zeros(planes.shape, np.uint32)
    for phase, first, stop, _ in _blocks(field):
        inside = (slice(phase.before, phase.stop), slice(first, stop))
        keys[inside], signs = field.keys(phase, first, stop, _of_one(coefficients[phase.before]))
        if signs is not None:
            negative[inside] = signs[0]
        field.put(phase, first, stop, planes[inside][None])
    return field.in_rows(keys, np.uint8), 1 - 2 * field.in_rows(negative >> 31, np.int32)


def _laid_out(q: Numbers, shape: tuple[int, ...], distance: int) -> tuple[Field, Floats, dict[int, Floats | None]]:
    """An empty field, the (K, O, G) numbers in its layout, and the coefficients that fit them."""
    field = Field(shape, [int(np.abs(q).max())], [start_of(q)], distance)
    order = [position for phase in field.phases for position in phase.positions]
    planes = q.reshape(-1, len(order)).T[order].astype(np.float32, order="C")  # (K, O * G)
    return field, planes.reshape(field.planes.shape[1:]), fitted(planes, field.phases)


def _of_one(coefficients: Floats | None) -> Floats | None:
    return None if coefficients is None else coefficients[None]


@lru_cache(maxsize=1)
def _coefficient_model() -> Any:
    weights = starting_weights(_COEFFICIENT_CONTEXT, LARGEST_COEFFICIENT, len(STRENGTHS) - 1)[:1].copy()
    table = shares(weights, (1 << PRECISION) - weights.shape[1])
    return categorical(table[0])


def _decode_coefficients(coder: Any, plan: Sequence[Phase]) -> dict[int, Floats | None]:
    count = sum(len(sources) for phase in plan for sources in phase.sources)
    return unflat(coder.decode(_coefficient_model(), count) - LARGEST_COEFFICIENT if count else np.empty(0), plan)
