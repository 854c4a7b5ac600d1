"""The entropy coder against a decoder in plain Python integers, written from docs/format.md alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersenet.codec import entropy


def plain_decode(stream: bytes, count: int) -> bytes:
    """docs/format.md, "Streams", with Python's integers only."""
    kind = stream[0]
    if kind == 0:
        return stream[1:]
    if kind == 1:
        return stream[1:2] * count
    weight, width = [(2, 0), (32, 0), (16, 1), (8, 2), (4, 4), (2, 8), (1, 16)][kind - 2]
    low, high = stream[1], stream[2]
    n = high - low + 1
    words = [int.from_bytes(stream[i : i + 4], "little") for i in range(3, len(stream), 4)]
    state = words.pop()
    if words:
        state = state << 32 | words.pop()
    counts, out, block_end = [0] * n, [], 0
    while len(out) < count:
        block_end = min(count, block_end + max(32, block_end // 4))
        w = [
            1 + weight * sum(counts[j] * (width + 1 - abs(i - j)) for j in range(n) if abs(i - j) <= width)
            for i in range(n)
        ]
        f = [1 + x * (2**24 - n) // sum(w) for x in w]
        f[f.index(max(f))] += 2**24 - sum(f)
        fresh = []
        while len(out) + len(fresh) < block_end:
            low_bits, start, symbol = state % 2**24, 0, 0
            while start + f[symbol] <= low_bits:
                start += f[symbol]
                symbol += 1
            state = (state >> 24) * f[symbol] + low_bits - start
            if state < 2**32 and words:
                state = state << 32 | words.pop()
            fresh.append(symbol)
        for symbol in fresh:
            counts[symbol] += 1
        out += fresh
    assert state == 0
    assert not words
    return bytes(low + symbol for symbol in out)


def bell(count: int, deviation: float, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).normal(128, deviation, count), 0, 255).astype(np.uint8)


CASES = {
    "bell": bell(700, 20),
    "narrow": bell(500, 1),
    "two values": np.random.default_rng(0).choice(np.array([3, 200], np.uint8), 300, p=[0.9, 0.1]),
    "all values": np.arange(2048, dtype=np.uint8),
    "short": np.array([5, 5, 6], np.uint8),
}


@pytest.mark.parametrize("smoothing", range(len(entropy.SMOOTHING)))
@pytest.mark.parametrize("data", CASES.values(), ids=CASES.keys())
def test_every_smoothing_agrees_with_the_plain_decoder(data: np.ndarray, smoothing: int) -> None:
    low, high = int(data.min()), int(data.max())
    stream = entropy._encode(*entropy._blocks_of(data, low, high), smoothing, bytes([low, high]))
    assert plain_decode(stream, len(data)) == data.tobytes()
    assert entropy.decode(stream, len(data)).tobytes() == data.tobytes()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes_come_back(data: bytes) -> None:
    stream = entropy.encode(np.frombuffer(data, np.uint8))
    assert entropy.decode(stream, len(data)).tobytes() == data
    assert len(stream) <= len(data) + 1


def test_the_size_is_near_the_entropy_of_the_histogram() -> None:
    data = bell(100_000, 10)
    share = np.bincount(data) / len(data)
    entropy_bytes = -(share[share > 0] * np.log2(share[share > 0])).sum() * len(data) / 8
    assert len(entropy.encode(data)) < 1.005 * entropy_bytes


def frequencies(counts: np.ndarray, smoothing: int) -> np.ndarray:
    return 1 + entropy.shares(1 + entropy.smoothed(counts, smoothing), (1 << 24) - counts.shape[1])


def test_frequencies_are_positive_and_whole() -> None:
    rng = np.random.default_rng(1)
    for smoothing in range(len(entropy.SMOOTHING)):
        for size in (2, 17, 256):
            for total in (0, 10, entropy.LONGEST // size):
                counts = rng.integers(0, total + 1, (3, size))
                f = frequencies(counts, smoothing)
                assert f.min() >= 1
                assert f.sum(1).tolist() == [1 << 24] * 3
                assert np.array_equal(f[1:2], frequencies(counts[1:2], smoothing))  # rows do not mix
    one = np.zeros((1, 256), np.int64)
    one[0, 7] = entropy.LONGEST
    for smoothing in range(len(entropy.SMOOTHING)):  # the most lopsided: no product may leave 63 bits
        assert frequencies(one, smoothing).argmax() == 7
        assert frequencies(one, smoothing).min() >= 1


BROKEN = {
    "empty": b"",
    "unknown kind": bytes([9, 0, 1]) + b"\1\0\0\0",
    "raw of another length": bytes([0, 1, 2]),
    "constant of two": bytes([1, 7, 7]),
    "no words": bytes([2, 0, 1]),
    "odd length": bytes([2, 0, 1, 1, 2]),
    "last word zero": bytes([2, 0, 1, 0, 0, 0, 0]),
    "values the wrong way": bytes([2, 5, 4, 1, 0, 0, 0]),
    "more than its symbols": bytes([2, 0, 1]) + b"\xff" * 400,
}


@pytest.mark.parametrize("stream", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_stream_is_refused(stream: bytes) -> None:
    with pytest.raises(ValueError, match=r"stream|compressed"):
        entropy.decode(stream, 10)
