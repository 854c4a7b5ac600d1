"""Reads a .terse file with Python and NumPy alone, written from docs/format.md: no tersenet, no torch, no coder.

    python examples/read_terse.py model.terse            prints each tensor's name, type, shape and mean
    python examples/read_terse.py model.terse out.npz    writes them as NumPy arrays (bfloat16 as float32)

It shows that the description is enough. It is slow and trusts that the file is well meant: it checks no lengths.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import sys
import zlib
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int8": 1, "int16": 2, "int32": 4, "int64": 8}


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest, and the tensors by name."""
    data = Path(path).read_bytes()
    magic, version, flags, length, stored, _, crc = struct.unpack_from("<5sBBxQIII", data)
    if magic != b"TERSE" or version not in (2, 3) or length != len(data):
        raise ValueError(f"{path} is no whole .terse file of version 2 or 3")
    head = data[28 : 28 + stored]
    if zlib.crc32(head) != crc or hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise ValueError(f"{path} is damaged")
    fields = json.loads(zlib.decompress(head) if flags & 1 else head)
    at, found = 28 + stored, []
    for dtype, shape, codec, size, check in fields["blobs"]:
        raw = tensor_bytes(dtype, shape, codec, data[at : at + size])
        if zlib.crc32(raw) != check:
            raise ValueError(f"{path} is damaged at byte {at}")
        kind = "<u2" if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<")
        found.append(np.frombuffer(raw, kind).reshape(shape))
        if dtype == "bfloat16":  # the upper half of a float32
            found[-1] = (found[-1].astype("<u4") << 16).view("<f4")
        at += size
    return fields["manifest"], {name: found[i] for name, i in fields["names"]}


def tensor_bytes(dtype: str, shape: list[int], codec: str, payload: bytes) -> bytes:
    """A tensor's elements, little-endian, row-major."""
    size, count = SIZES.get(dtype, 1), math.prod(shape)
    if codec == "raw":
        return payload
    if codec == "floats":
        return float_bits(payload, size, count).tobytes()
    if codec == "integers":
        bits = planes(payload, size, count)
        return (bits ^ bits.dtype.type(1 << (8 * size - 1) if dtype.startswith("int") else 0)).tobytes()
    if codec == "numbers":
        return numbers(payload, shape).astype(f"<i{size}").tobytes()
    if codec == "codebook":
        stop = 2 + (payload[0] + 1) * size
        return np.frombuffer(payload[2:stop], f"<u{size}")[numbers(payload[stop:], shape) + payload[1]].tobytes()
    if codec == "grid":
        rows, stop = (shape[0], 5 + int.from_bytes(payload[1:5], "little")) if payload[0] else (1, 5)
        steps = float_bits(payload[5:stop], 4, rows).view("<f4") if payload[0] else np.frombuffer(payload[1:5], "<f4")
        return (numbers(payload[stop:], shape).astype("<f4").reshape(rows, -1) * steps[:, None]).tobytes()
    stop = 4 + int.from_bytes(payload[:4], "little")  # sparse
    out = np.zeros(count, f"<u{size}")
    kept = numbers(payload[4:stop], shape) == 1
    out[kept] = float_bits(payload[stop:], size, int(kept.sum()))
    return out.tobytes()


def float_bits(payload: bytes, size: int, count: int) -> np.ndarray:
    bits = planes(payload, size, count)
    return (bits >> 1 | bits << (8 * size - 1)).astype(bits.dtype)


def planes(payload: bytes, size: int, count: int) -> np.ndarray:
    columns, at = [], 0
    for i in range(size):
        length = len(payload) - at
        if i < size - 1:
            length, at = int.from_bytes(payload[at : at + 4], "little"), at + 4
        columns.append(stream(payload[at : at + length], count))
        at += length
    return np.ascontiguousarray(np.stack(columns[::-1], 1)).reshape(-1).view(f"<u{size}")


class Ans:
    """The coder: a state of 64 bits, a stack of words of 32."""

    def __init__(self, data: bytes) -> None:
        self.words = np.frombuffer(data, "<u4").tolist()
        self.state = self.words.pop() if self.words else 0
        if self.words:
            self.state = self.state << 32 | self.words.pop()

    def take(self, f: np.ndarray, count: int) -> list[int]:
        """The next `count` symbols, whose frequencies f sum to 2**24."""
        starts, sizes, out = (np.cumsum(f) - f).tolist(), f.tolist(), []
        for _ in range(count):
            low = self.state & 0xFFFFFF
            symbol = bisect_right(starts, low) - 1
            self.state = (self.state >> 24) * sizes[symbol] + low - starts[symbol]
            if self.state < 1 << 32 and self.words:
                self.state = self.state << 32 | self.words.pop()
            out.append(symbol)
        return out


def frequencies(weights: np.ndarray) -> np.ndarray:
    f = 1 + weights * (2**24 - len(weights)) // weights.sum()
    f[f.argmax()] += 2**24 - f.sum()
    return f


def stream(data: bytes, count: int) -> np.ndarray:
    if data[0] < 2:
        return np.frombuffer(data[1:] if data[0] == 0 else data[1:2] * count, np.uint8)
    weight, width = [(2, 0), (32, 0), (16, 1), (8, 2), (4, 4), (2, 8), (1, 16)][data[0] - 2]
    low, size, coder = data[1], data[2] - data[1] + 1, Ans(data[3:])
    smooth = np.maximum(width + 1 - np.abs(np.arange(size)[:, None] - np.arange(size)), 0)
    counts, out = np.zeros(size, np.int64), list[int]()
    while len(out) < count:
        block = coder.take(frequencies(1 + weight * (smooth @ counts)), min(max(32, len(out) // 4), count - len(out)))
        counts += np.bincount(block, minlength=size)
        out += block
    return np.array(out, np.uint8) + np.uint8(low)


def numbers(data: bytes, shape: list[int]) -> np.ndarray:
    """Small whole numbers, in one of eight forms."""
    form, body, count = data[0], data[1:], math.prod(shape)
    if form in (5, 7):
        return contexts(body, shape) if form == 5 else predicted(body, shape)
    if form == 3:  # relative
        _, low, entries, length = struct.unpack_from("<BhII", body)
        out = np.zeros(count, np.int64)
        out[np.cumsum(huffman(body[11 : 11 + length], entries) + 1) - 1] = low + huffman(body[11 + length :], entries)
        return out
    if form == 6:  # significant
        length = int.from_bytes(body[:4], "little")
        out = contexts(body[4 : 4 + length], shape)
        out[out != 0] = numbers(body[4 + length :], [int(out.sum())])
        return out
    low, body = int.from_bytes(body[:2], "little", signed=True), body[2:]
    if form < 2:
        return np.full(count, low, np.int64) if form else low + packed(body[1:], body[0], count)
    return low + (huffman(body, count) if form == 2 else stream(body, count).astype(np.int64))


def packed(data: bytes, width: int, count: int) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(data, np.uint8))[: count * width].reshape(count, width)
    return bits.astype(np.int64) @ (1 << np.arange(width - 1, -1, -1))


def huffman(data: bytes, count: int) -> np.ndarray:
    stop = 2 + -(-(size := int.from_bytes(data[:2], "little")) * 5 // 8)
    lengths = packed(data[2:stop], 5, size).tolist()
    table, code, before = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths) if length):
        code <<= length - before
        table[length, code] = symbol
        code, before = code + 1, length
    bits, at, out = np.unpackbits(np.frombuffer(data[stop:], np.uint8)).tolist(), 0, []
    for _ in range(count):
        code = length = 0
        while (length, code) not in table:
            code, length, at = code << 1 | bits[at], length + 1, at + 1
        out.append(table[length, code])
    return np.array(out, np.int64)


def log16(x: int) -> int:
    """16 log2(x), linear between powers of two, rounded down."""
    e = max(x, 1).bit_length() - 1
    return 16 * e + ((max(x, 1) - (1 << e)) << 4 >> e)


def power4(x: int) -> int:
    return max(1, (4096, 4871, 5793, 6889)[x % 4] << (x >> 2) >> 12)


def starting_model(context: int, low: int, high: int, strength: int) -> np.ndarray:
    mean, reach = power4(2 * context), max(high, -low)
    mean = mean if low >= 0 else max(1, 2 * mean // 3)
    theta, side = (mean << 16) // (4096 + (mean if low >= 0 else math.isqrt(4096**2 + mean**2))), [1 << 24]
    for _ in range(reach):
        side.append(side[-1] * theta >> 16)
    table = side[max(low, 0) : high + 1]
    if low < 0:
        both = np.array(side[:0:-1] + side, np.int64) // (2 * sum(side) >> 20)
        table = np.convolve(both, both, "same")[low + reach : high + reach + 1].tolist()
    return np.array([1 + x * 64 * (16, 64, 256)[strength] // max(1, sum(table)) for x in table], np.int64)


def blocks(rows: int, groups: int, sizes: list[int], least: int, growth: int) -> Any:
    """(phase, columns of a group before it, how many of them times rows before the block, first row, the one after)."""
    for phase, size in enumerate(sizes):
        known, stop = sum(sizes[:phase]), 0
        while stop < rows:
            first, before = stop, known * rows + stop * size
            most = 65536 if phase and growth > 1 else min(max(least, growth * before * groups), 65536)
            stop = min(rows, first + max(1, most // (groups * size)))
            yield phase, known, before, first, stop


def learn(out: np.ndarray, coder: Ans, models: dict[int, Any], places: dict[int, list[Any]], start: Any) -> None:
    """Takes the numbers of a block, one context after another; each place says also what its symbol stands for."""
    for key in sorted(places):
        if key not in models:
            models[key] = start(key)
        symbols = coder.take(frequencies(models[key]), len(places[key]))
        models[key] += 64 * np.bincount(symbols, minlength=len(models[key]))
        for (at, low, sign), symbol in zip(places[key], symbols, strict=True):
            out[at] = sign * (low + symbol)


def contexts(data: bytes, shape: list[int]) -> np.ndarray:
    low, high, start, strength = struct.unpack_from("<hhBB", data)
    coder, models = Ans(data[6:]), dict[int, np.ndarray]()
    rows, columns, kernel = shape[0], math.prod(shape[1:]), math.prod(shape[2:])
    kernels = 4 <= kernel <= 32
    period = 1 if len(shape) < 2 else kernel if kernels else min(8, columns)
    groups = -(-columns // period)
    out = np.zeros((rows, groups * period), np.int64)
    for phase, _, before, first, stop in blocks(rows, groups, [1] * period, 64, 1):
        known = np.abs(out).reshape(rows, groups, period)  # what is not known yet is 0
        mean = max(1, (4096 * int(known.sum()) + 16 * power4(start)) // (before * groups + 16))
        row = [log16(4096 * s + 8 * mean) - log16((phase * groups + 8) * mean) for s in known.sum((1, 2)).tolist()]
        group = [(4096 * s + 8 * mean) // (before + 8) for s in known.sum((0, 2)).tolist()]
        sums, column = np.minimum(known.sum(2), 255), known.sum(0).reshape(-1).tolist()
        places: dict[int, list[Any]] = {}
        for o, g in ((o, g) for o in range(first, stop) for g in range(groups)):
            at = g * period + (phase - o) % period
            each = group[g] if kernels else (4096 * column[at] + 4 * group[g]) // (before // period + 4)
            j = min(max(row[o] + log16(each + 1) + 2 >> 2, 0), 83)
            c = j + 1 >> 1
            if phase and kernels:
                c = log16((4096 * int(sums[o, g]) + 6 * power4(j)) // (phase + 6)) + 4 >> 3
            if at < columns:
                places.setdefault(min(max(c, 0), 41), []).append(((o, at), low, 1))
        learn(out, coder, models, places, lambda c: starting_model(c, low, high, strength))
    return out[:, :columns].reshape(-1)


UNITS = [[max(5, power4(2 * c) >> (8 + shift)) for c in range(42)] for shift in range(5)]


def starting_weights(key: int, reach: int, strength: int) -> np.ndarray:
    """Of a key of predicted numbers: the scale's context times six, and the forecast's level."""
    shift, scale = max(0, reach.bit_length() - 4), max(128, power4(key // 6 * 2))
    centre = ((0, 3, 6, 10, 16, 28)[key % 6] * UNITS[shift][key // 6] >> 3) << shift
    away = np.abs(np.arange(-reach, reach + 1)[:, None] * 16 - centre + np.array([-6, -2, 2, 6]))
    y = away * (580905600 // scale) >> 12
    density = ((scale + 384 * away) * ((512 - y % 256) * 16 >> np.minimum(y // 256, 40))).sum(1)
    return 1 + density * 64 * (16, 64, 256)[strength] // max(1, density.sum())


def predicted(data: bytes, shape: list[int]) -> np.ndarray:
    """Numbers of kernels, each foretold from those of its kernel that are known."""
    reach, start, strength, distance = data[:4]
    coder, models, shift = Ans(data[4:]), dict[int, np.ndarray](), max(0, reach.bit_length() - 4)
    rows, groups, width, size = shape[0], shape[1], shape[-1], math.prod(shape[2:])
    away = [(abs(t // width - size // width // 2), abs(t % width - width // 2)) for t in range(size)]
    step = [(y | x) & -(y | x) for y, x in away]  # the highest power of 2 that divides both; 0 at the centre
    rank = [(-v if v else -99, y // max(v, 1) % 2 * (x // max(v, 1) % 2)) for v, (y, x) in zip(step, away, strict=True)]
    order = sorted(range(size), key=lambda t: (rank[t], t))
    far = [[max(abs(t // width - s // width), abs(t % width - s % width)) for s in range(size)] for t in range(size)]
    sources = [[s for s in order if rank[s] < rank[t] and far[t][s] <= distance * step[t]] for t in order]
    stored = iter(coder.take(frequencies(starting_weights(168, 127, 2)), sum(map(len, sources))))
    weights = {t: [(s, next(stored) - 127) for s in near] for t, near in zip(order, sources, strict=True)}
    out = np.zeros((rows, groups, size), np.int64)
    phases = [[t for t in order if rank[t] == each] for each in sorted(set(rank))]
    for phase, known, before, first, stop in blocks(rows, groups, list(map(len, phases)), 256, 3):
        sums = np.abs(out[:, :, order[: -len(phases[-1])]]).sum(2)  # as they were when the last phase began
        mean = max(1, (4096 * int(sums.sum()) + 16 * power4(start)) // (before * groups + 16))
        row = [log16(4096 * s + 8 * mean) - log16((known * groups + 8) * mean) for s in sums.sum(1).tolist()]
        group = [log16((4096 * s + 8 * mean) // (before + 8) + 1) for s in sums.sum(0).tolist()]
        places: dict[int, list[Any]] = {}
        for t, o, g in ((t, o, g) for t in phases[phase] for o in range(first, stop) for g in range(groups)):
            j = min(max(row[o] + group[g] + 2 >> 2, 0), 83)
            here = min(int(sums[o, g]) >> shift, 255) << shift
            c = log16((4096 * here + 6 * power4(j)) // (known + 6)) + 4 >> 3 if known else j + 1 >> 1
            c = min(max(c, 0), 41)
            mu = int(sum(w * out[o, g, s] for s, w in weights[t]))
            level = sum(8 * min(abs(mu) >> shift, 511) >= edge * UNITS[shift][c] for edge in (2, 4, 8, 13, 22))
            places.setdefault(6 * c + level, []).append(((o, g, t), -reach, -1 if mu < 0 else 1))
        learn(out, coder, models, places, lambda key: starting_weights(key, reach, strength))
    return out.reshape(-1)


if __name__ == "__main__":
    _, arrays = read(sys.argv[1])
    if len(sys.argv) > 2:
        np.savez(sys.argv[2], allow_pickle=False, **arrays)
    for key, value in arrays.items():
        print(key, value.dtype, value.shape, float(value.astype(np.float64).mean()) if value.size else 0.0)
