"""Numbers of kernels, foretold from their neighbours: all come back, likeness is used, nonsense is refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from tersenet.codec import contexts, predicted
from tersenet.codec.phases import phases


def smooth(rows: int = 48, groups: int = 32, scale: float = 2.0) -> np.ndarray:
    """(O, I, 3, 3) numbers that are alike in sign and size within a kernel."""
    chance = np.random.default_rng(0)
    w = chance.normal(0, 1, (rows, groups, 5, 5))
    w = sum(w[:, :, y : y + 3, x : x + 3] for y in range(3) for x in range(3)) / 3
    return np.rint(w * scale).astype(np.int32)


def test_an_order_of_halves() -> None:
    plan = phases(3, 3, 1)
    assert [phase.positions for phase in plan] == [(4,), (1, 3, 5, 7), (0, 2, 6, 8)]
    assert plan[1].sources == ((0,),) * 4
    assert plan[2].sources[0] == (0, 1, 2)  # the centre, the upper and the left neighbour, by order of coding
    assert [len(phase.positions) for phase in phases(5, 5, 1)] == [1, 4, 4, 12, 4]
    assert not any(any(phase.sources) for phase in phases(5, 5, 0))


@pytest.mark.parametrize("shape", [(1, 1, 2), (7, 3, 4), (6, 4, 3, 3), (5, 6, 1, 7), (3, 2, 8, 8), (2, 3, 2, 2, 2)])
@pytest.mark.parametrize("scale", [0.2, 3, 80])
def test_all_come_back(shape: tuple[int, ...], scale: float) -> None:
    q = np.random.default_rng(1).normal(0, scale, shape).round().clip(-255, 255).astype(np.int32).reshape(-1)
    q[-1] = -3
    for strength in range(3):
        for distance in predicted.DISTANCES:
            stream = predicted.encode(q, shape, (strength,), distance)
            assert np.array_equal(predicted.decode([stream], shape)[0], q)


def test_more_than_one_block_and_large_forecasts() -> None:
    q = np.tile(np.array([255, -255, 0], np.int32), (300, 100, 3)).reshape(300, 100, 3, 3)
    q[:, ::3] = 1
    stream = predicted.encode(q.reshape(-1), q.shape, (1,), 1)
    assert np.array_equal(predicted.decode([stream], q.shape)[0], q.reshape(-1))


def test_likeness_within_kernels_is_worth_bytes() -> None:
    q = smooth()
    apart = np.random.default_rng(2).permuted(q, axis=1)  # the same numbers, each position shuffled by itself
    size = len(predicted.encode(q.reshape(-1), q.shape, (1,), 1))
    assert size < 0.9 * len(predicted.encode(q.reshape(-1), q.shape, (1,), 0))
    assert size < 0.9 * len(contexts.encode(q.reshape(-1), q.shape, (1,)))
    assert size < 0.9 * len(predicted.encode(apart.reshape(-1), q.shape, (1,), 1))


@pytest.mark.parametrize("reach", [1, 15, 16, 255])
def test_models_start_around_their_forecast(reach: int) -> None:
    for context in (c for c in (8, 16, 20, 24, 28, 36) if contexts.power4(2 * c) <= 2048 * reach):
        means = [
            float((np.arange(-reach, reach + 1) * w).sum() / w.sum())
            for w in (predicted.starting_weights(context, reach, 2)[level] for level in range(6))
        ]
        assert abs(means[0]) < 1e-3
        assert means == sorted(means)


def test_nonsense_is_refused() -> None:
    shape, q = (8, 4, 3, 3), smooth(8, 4)
    good = predicted.encode(q.reshape(-1), shape, (1,), 1)
    for bad in (b"", good[:3], good[:-1], b"\0" + good[1:], good[:1] + b"\x54" + good[2:], good[:2] + b"\3" + good[3:],
                good[:3] + b"\3" + good[4:], good + struct.pack("<I", 1)):  # fmt: skip
        with pytest.raises(ValueError, match="predicted"):
            predicted.decode([bad], shape)
    for wrong in ((288,), (32, 9), (8, 4, 9, 9)):
        with pytest.raises(ValueError, match="no kernels"):
            predicted.decode([good], wrong)
