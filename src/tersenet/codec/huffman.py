"""Canonical Huffman coding, dense and with the relative indices of Deep Compression.

Source: Han, Mao, Dally, Deep Compression (arXiv:1510.00149), section 3 and figure 2: the zeros before each number
that is not 0 are counted in a few bits; where there are more, a 0 is written as filler. Departures: the width of
these counts is chosen per tensor (the paper takes 8 bits for convolutions and 5 for linear layers), and codes are
canonical, so that only their lengths are stored. At most 16 bits long: counts are halved until they are.
"""

from __future__ import annotations

import heapq
import struct

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

LONGEST_CODE = 16
WIDTHS = (3, 4, 5, 6, 8)
LARGEST_ALPHABET = 512
_CHUNK = 1 << 14  # bytes whose bits are looked at together
_DOUBLINGS = 6


def pack_bits(values: Ints, width: int) -> bytes:
    """(n,) numbers of `width` bits, the most significant bit first, the last byte filled with zeros."""
    places = np.arange(width - 1, -1, -1)
    return np.packbits(((values[:, None] >> places) & 1).astype(np.uint8)).tobytes()


def unpack_bits(data: bytes, width: int, count: int) -> Ints:
    """The inverse. Raises ValueError when the bytes are not as many as the numbers need."""
    if len(data) != -(-count * width // 8):
        raise ValueError(f"{count} numbers of {width} bits are in {len(data)} bytes")
    out = np.zeros(count, np.int64)
    flat = np.unpackbits(np.frombuffer(data, np.uint8), count=count * width)
    for place in range(width):
        out = out << 1 | flat[place::width]
    return out


def code_lengths(counts: list[int]) -> list[int]:
    """The length of each symbol's code, 0 where it does not come."""
    while True:
        heap: list[tuple[int, int, tuple[int, ...]]] = [
            (count, symbol, (symbol,)) for symbol, count in enumerate(counts) if count
        ]
        lengths = [0] * len(counts)
        if len(heap) == 1:
            lengths[heap[0][1]] = 1
        heapq.heapify(heap)
        while len(heap) > 1:
            first, second = heapq.heappop(heap), heapq.heappop(heap)
            for symbol in (*first[2], *second[2]):
                lengths[symbol] += 1
            heapq.heappush(heap, (first[0] + second[0], min(first[1], second[1]), first[2] + second[2]))
        if max(lengths) <= LONGEST_CODE:
            return lengths
        counts = [(count + 1) // 2 for count in counts]


def canonical(lengths: list[int]) -> list[int]:
    """The codes: in order of length and then of symbol, each the one before plus 1."""
    codes, code, previous = [0] * len(lengths), 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths) if length):
        code <<= length - previous
        codes[symbol] = code
        code += 1
        previous = length
    if code > 1 << previous:
        raise ValueError("the lengths of a Huffman code are impossible")
    return codes


def encode(symbols: Ints) -> bytes:
    """(n,) symbols of 0 to 511, n at least 1: the alphabet's size (uint16), lengths of 5 bits, the codes."""
    counts = np.bincount(symbols)
    lengths = code_lengths(counts.tolist())
    codes = np.array(canonical(lengths), np.int64)[symbols]
    sizes = np.array(lengths, np.int64)
    places = np.arange(LONGEST_CODE)
    parts = []
    for start in range(0, len(symbols), 1 << 16):
        chosen = sizes[symbols[start : start + (1 << 16)]][:, None]
        shift = chosen - 1 - places[None, :]
        flags = (codes[start : start + (1 << 16), None] >> np.maximum(shift, 0)) & 1
        parts.append(flags[shift >= 0].astype(np.uint8))
    table = struct.pack("<H", len(lengths)) + pack_bits(sizes, 5)
    return table + np.packbits(np.concatenate(parts)).tobytes()


def decode(stream: bytes, count: int) -> Ints:
    """The (count,) symbols. Raises ValueError when the stream cannot be one of ours."""
    if len(stream) < 2:
        raise ValueError("a Huffman stream ends within its table")
    (size,) = struct.unpack_from("<H", stream)
    start = 2 + -(-size * 5 // 8)
    if not 0 < size <= LARGEST_ALPHABET or len(stream) < start:
        raise ValueError(f"a Huffman table of {size} symbols is not allowed or ends early")
    if count > 8 * (len(stream) - start):
        raise ValueError(f"a Huffman stream of {len(stream)} bytes is too short for {count} symbols")
    lengths = unpack_bits(stream[2:start], 5, size).tolist()
    if max(lengths) > LONGEST_CODE:
        raise ValueError("a Huffman code is longer than 16 bits")
    longest = max(lengths)
    symbol_of = np.zeros(1 << longest, np.int64)
    length_of = np.zeros(1 << longest, np.int64)
    for symbol, (code, length) in enumerate(zip(canonical(lengths), lengths, strict=True)):
        if length:
            low = code << (longest - length)
            symbol_of[low : low + (1 << (longest - length))] = symbol
            length_of[low : low + (1 << (longest - length))] = length
    return _walk(stream[start:], count, symbol_of, length_of, longest)


def _walk(data: bytes, count: int, symbol_of: Ints, length_of: Ints, longest: int) -> Ints:
    """Looks up what a code would be at every bit of a chunk, then goes from code to code."""
    found, at, done = np.empty(count, np.int64), 0, 0
    padded = np.frombuffer(data + bytes(4), np.uint8).astype(np.int64)
    while done < count:
        first = at >> 3
        part = padded[first : first + _CHUNK + 4]
        words = part[:-3] << 24 | part[1:-2] << 16 | part[2:-1] << 8 | part[3:]
        windows = ((words[:, None] >> (32 - longest - np.arange(8))) & ((1 << longest) - 1)).reshape(-1)
        steps = length_of[windows]
        places = _places(steps, at - 8 * first, min(8 * _CHUNK, len(steps)))[: count - done]
        if not steps[places].all():
            raise ValueError("a Huffman stream holds a code that its table has not")
        found[done : done + len(places)] = symbol_of[windows[places]]
        done += len(places)
        at = 8 * first + int(places[-1] + steps[places[-1]])
        if at > 8 * len(data):
            raise ValueError("a Huffman stream ends early")
    if -(-at // 8) != len(data):
        raise ValueError("a Huffman stream holds more than its symbols")
    return found


def _places(steps: Ints, start: int, stop: int) -> Ints:
    """Where codes begin, from bit `start` on and before `stop`, when a code at bit i has steps[i] bits. Should one have
    no bits, it is the last.

    64 codes are one step, found by doubling: one code after another would be a step of Python for each.
    """
    jumps = [np.arange(stop + LONGEST_CODE, dtype=np.int64)]  # from `stop` on nothing moves
    jumps[0][:stop] += steps[:stop]
    while len(jumps) <= _DOUBLINGS:
        jumps.append(jumps[-1][jumps[-1]])
    far, here = jumps.pop(), start
    heads = []
    while here < stop:
        heads.append(here)
        here = int(far[here])
        if here == heads[-1]:  # it stands still
            break
    places = np.array(heads, np.int64)
    for jump in reversed(jumps):
        places = np.stack([places, jump[places]], axis=1).reshape(-1)
    ends = ((places >= stop) | (steps[np.minimum(places, stop - 1)] == 0)).nonzero()[0]
    return places if not len(ends) else places[: ends[0] + int(places[ends[0]] < stop)]


def encode_relative(q: NDArray[np.int32], width: int) -> bytes:
    """(n,) numbers, mostly 0: width (a byte), low (int16), number of entries and bytes of the gaps (uint32), gaps,
    values less low."""
    longest = (1 << width) - 1
    where = np.flatnonzero(q)
    gaps = np.diff(where, prepend=-1) - 1
    fillers = gaps >> width
    last = np.cumsum(fillers + 1) - 1  # the entry of each number, behind its fillers
    entries = int(last[-1]) + 1
    all_gaps = np.full(entries, longest, np.int64)
    all_gaps[last] = gaps & longest
    values = np.zeros(entries, np.int64)
    values[last] = q[where]
    low = int(values.min())
    coded = encode(all_gaps)
    return struct.pack("<BhII", width, low, entries, len(coded)) + coded + encode(values - low)


def decode_relative(stream: bytes, count: int) -> NDArray[np.int32]:
    """The (count,) numbers. Raises ValueError when the stream cannot be one of ours."""
    if len(stream) < 11:
        raise ValueError("a relative index ends early")
    width, low, entries, length = struct.unpack_from("<BhII", stream)
    if width not in WIDTHS or entries > count or length > len(stream) - 11:
        raise ValueError(f"a relative index of {width} bits and {entries} entries in {length} bytes is not allowed")
    gaps = decode(stream[11 : 11 + length], entries)
    values = decode(stream[11 + length :], entries) + low
    where = np.cumsum(gaps + 1) - 1
    if entries and where[-1] >= count:
        raise ValueError("a relative index goes beyond its tensor")
    out = np.zeros(count, np.int32)
    out[where] = values
    return out
