"""Reads a .terse file with Python and NumPy alone, written from docs/format.md: no tersenet, no torch, no coder.

    python examples/read_terse.py model.terse            prints each tensor's name, type, shape and mean
    python examples/read_terse.py model.terse out.npz    writes them as NumPy arrays (bfloat16 as float32)

It shows that the format can be read from its description, and checks that tersenet reads the same. It is slow (about
half a million weights a second) and trusts that the file is well meant: it checks the checksums, and not each length.
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

SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int8": 1, "int16": 2, "int32": 4, "int64": 8,
         "uint8": 1, "bool": 1}  # fmt: skip


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest, and the tensors by name."""
    data = Path(path).read_bytes()
    magic, version, flags, length, stored, _, crc = struct.unpack_from("<5sBBxQIII", data)
    if magic != b"TERSE" or version != 2 or length != len(data):
        raise ValueError(f"{path} is no whole .terse file of version 2")
    head = data[28 : 28 + stored]
    if zlib.crc32(head) != crc or hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise ValueError(f"{path} is damaged")
    fields = json.loads(zlib.decompress(head) if flags & 1 else head)
    at, found = 28 + stored, []
    for dtype, shape, codec, size, check in fields["blobs"]:
        raw = tensor_bytes(dtype, shape, codec, data[at : at + size])
        if zlib.crc32(raw) != check:
            raise ValueError(f"{path} is damaged at byte {at}")
        found.append(array(raw, dtype).reshape(shape))
        at += size
    return fields["manifest"], {name: found[i] for name, i in fields["names"]}


def array(raw: bytes, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, np.dtype(dtype).newbyteorder("<"))


def tensor_bytes(dtype: str, shape: list[int], codec: str, payload: bytes) -> bytes:
    """A tensor's elements, little-endian, row-major."""
    size, count = SIZES[dtype], math.prod(shape)
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
            length = int.from_bytes(payload[at : at + 4], "little")
            at += 4
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
        starts = (np.cumsum(f) - f).tolist()
        sizes, out = f.tolist(), []
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
    """Bytes without contexts."""
    if data[0] < 2:
        return np.frombuffer(data[1:] if data[0] == 0 else data[1:2] * count, np.uint8)
    weight, width = [(2, 0), (32, 0), (16, 1), (8, 2), (4, 4), (2, 8), (1, 16)][data[0] - 2]
    low, size, coder = data[1], data[2] - data[1] + 1, Ans(data[3:])
    apart = np.abs(np.arange(size)[:, None] - np.arange(size))
    smooth = np.maximum(width + 1 - apart, 0)
    counts, out = np.zeros(size, np.int64), list[int]()
    while len(out) < count:
        block = coder.take(frequencies(1 + weight * (smooth @ counts)), min(max(32, len(out) // 4), count - len(out)))
        counts += np.bincount(block, minlength=size)
        out += block
    return np.array(out, np.uint8) + np.uint8(low)


def numbers(data: bytes, shape: list[int]) -> np.ndarray:
    """Small whole numbers, in one of seven forms."""
    form, body, count = data[0], data[1:], math.prod(shape)
    if form == 3:
        return relative(body, count)
    if form == 5:
        return contexts(body, shape)
    if form == 6:
        length = int.from_bytes(body[:4], "little")
        out = contexts(body[4 : 4 + length], shape)
        out[out != 0] = numbers(body[4 + length :], [int(out.sum())])
        return out
    low, body = int.from_bytes(body[:2], "little", signed=True), body[2:]
    if form == 0:
        return low + packed(body[1:], body[0], count)
    if form == 1:
        return np.full(count, low, np.int64)
    return low + (huffman(body, count) if form == 2 else stream(body, count).astype(np.int64))


def packed(data: bytes, width: int, count: int) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(data, np.uint8))[: count * width].reshape(count, width)
    return bits.astype(np.int64) @ (1 << np.arange(width - 1, -1, -1))


def huffman(data: bytes, count: int) -> np.ndarray:
    size = int.from_bytes(data[:2], "little")
    stop = 2 + -(-size * 5 // 8)
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


def relative(data: bytes, count: int) -> np.ndarray:
    _, low, entries, length = struct.unpack_from("<BhII", data)
    gaps = huffman(data[11 : 11 + length], entries)
    out = np.zeros(count, np.int64)
    out[np.cumsum(gaps + 1) - 1] = low + huffman(data[11 + length :], entries)
    return out


def log16(x: int) -> int:
    """16 log2(x), linear between powers of two, rounded down."""
    e = x.bit_length() - 1
    return 16 * e + ((x - (1 << e)) << 4 >> e)


def power4(x: int) -> int:
    return max(1, (4096, 4871, 5793, 6889)[x % 4] << (x >> 2) >> 12)


def starting_model(context: int, low: int, high: int, strength: int) -> np.ndarray:
    mean, reach = power4(2 * context), max(high, -low)
    if low >= 0:
        theta = (mean << 16) // (4096 + mean)
    else:
        mean = max(1, 2 * mean // 3)
        theta = (mean << 16) // (4096 + math.isqrt(4096**2 + mean**2))
    side = [1 << 24]
    for _ in range(reach):
        side.append(side[-1] * theta >> 16)
    if low >= 0:
        table = side[low : high + 1]
    else:
        both = np.array(side[:0:-1] + side, np.int64) // (2 * sum(side) >> 20)
        table = np.convolve(both, both, "same")[low + reach : high + reach + 1].tolist()
    return np.array([1 + x * 64 * (16, 64, 256)[strength] // max(1, sum(table)) for x in table], np.int64)


def contexts(data: bytes, shape: list[int]) -> np.ndarray:
    """Numbers whose models follow the magnitudes around them."""
    low, high, start, strength = struct.unpack_from("<hhBB", data)
    coder, models = Ans(data[6:]), dict[int, np.ndarray]()
    rows, columns, kernel = shape[0], math.prod(shape[1:]), math.prod(shape[2:])
    kernels = 4 <= kernel <= 32
    period = 1 if len(shape) < 2 else kernel if kernels else min(8, columns)
    groups = -(-columns // period)
    out = np.zeros((rows, groups * period), np.int64)
    row_sums, group_sums, column_sums, total = [0] * rows, [0] * groups, [0] * (groups * period), 0
    kernel_sums = np.zeros((rows, groups), np.int64)
    for phase in range(period):
        first = 0
        while first < rows:
            known = (phase * rows + first) * groups
            stop = min(rows, first + max(1, min(max(64, known), 65536) // groups))
            mean = max(1, (4096 * total + 16 * power4(start)) // (known + 16))
            row_n, before = (phase * groups + 8) * mean, phase * rows + first
            group = [(4096 * s + 8 * mean) // (before + 8) for s in group_sums]
            if kernels:
                foretold = [log16(s + 1) for s in group for _ in range(period)]
            else:
                column_n = before // period + 4
                foretold = [
                    log16((4096 * s + 4 * group[i // period]) // column_n + 1) for i, s in enumerate(column_sums)
                ]
            places: dict[int, list[tuple[int, int, int]]] = {}
            for o in range(first, stop):
                row = log16(4096 * row_sums[o] + 8 * mean) - log16(row_n) + 2
                place = (phase - o) % period
                for g in range(groups - (place + (groups - 1) * period >= columns)):
                    j = min(max(row + foretold[g * period + place] >> 2, 0), 83)
                    if phase and kernels:
                        known_sum = min(int(kernel_sums[o, g]), 255)
                        c = log16((4096 * known_sum + 6 * power4(j)) // (phase + 6)) + 4 >> 3
                    else:
                        c = j + 1 >> 1
                    places.setdefault(min(max(c, 0), 41), []).append((o, g, g * period + place))
            for c in sorted(places):
                model = models.setdefault(c, starting_model(c, low, high, strength))
                symbols = coder.take(frequencies(model), len(places[c]))
                model += 64 * np.bincount(symbols, minlength=len(model))
                for (o, g, column), symbol in zip(places[c], symbols, strict=True):
                    out[o, column] = low + symbol
                    magnitude = abs(low + symbol)
                    row_sums[o] += magnitude
                    group_sums[g] += magnitude
                    column_sums[column] += magnitude
                    kernel_sums[o, g] += magnitude
                    total += magnitude
            first = stop
    return out[:, :columns].reshape(-1)


if __name__ == "__main__":
    _, arrays = read(sys.argv[1])
    if len(sys.argv) > 2:
        np.savez(sys.argv[2], allow_pickle=False, **arrays)
    for key, value in arrays.items():
        print(key, value.dtype, value.shape, float(value.astype(np.float64).mean()) if value.size else 0.0)
