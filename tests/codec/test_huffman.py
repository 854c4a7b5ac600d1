"""Canonical Huffman codes: what is decoded many codes at a time is what going from code to code gives."""

from __future__ import annotations

import numpy as np
import pytest

from tersenet.codec import huffman


def one_by_one(steps: np.ndarray, start: int, stop: int) -> list[int]:
    places = []
    while start < stop:
        places.append(start)
        if not steps[start]:
            break
        start += int(steps[start])
    return places


@pytest.mark.parametrize("stop", [1, 7, 8, 63, 64, 65, 1000, 20_000])
@pytest.mark.parametrize("least", [0, 1, 16])
def test_places_are_those_of_one_code_after_another(stop: int, least: int) -> None:
    chance = np.random.default_rng(stop)
    for start in (0, min(3, stop)):
        steps = chance.integers(max(1, least), 17, stop + 5)
        if not least:  # one that stands for no code
            steps[chance.integers(0, stop, max(1, stop // 500))] = 0
        assert huffman._places(steps, start, stop).tolist() == one_by_one(steps, start, stop)


@pytest.mark.parametrize("symbols", [1, 2, 40, 512])
@pytest.mark.parametrize("count", [1, 65, 400_000])
def test_more_than_a_chunk_comes_back(symbols: int, count: int) -> None:
    q = np.minimum(np.random.default_rng(count).geometric(0.3, count) - 1, symbols - 1)
    q[0] = symbols - 1
    stream = huffman.encode(q)
    assert np.array_equal(huffman.decode(stream, count), q)
    with pytest.raises(ValueError, match="Huffman"):
        huffman.decode(stream[:-1], count)
    with pytest.raises(ValueError, match="more than its symbols"):
        huffman.decode(stream + b"\0", count)
