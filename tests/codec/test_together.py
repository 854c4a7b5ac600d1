"""Tensors decoded side by side: the same numbers as alone, and one that is wrong is found among the others."""

from __future__ import annotations

import struct
from types import ModuleType

import numpy as np
import pytest

from tersenet.codec import adaptive, contexts, entropy, numbers, predicted, together

FORMS = pytest.mark.parametrize("form", [contexts, predicted], ids=["contexts", "predicted"])


def drawn(shape: tuple[int, ...], scale: float, seed: int) -> np.ndarray:
    q = np.random.default_rng(seed).normal(0, scale, shape).round().clip(-15, 15).astype(np.int32).reshape(-1)
    q[:2] = -1, 1
    return q


def streams(form: ModuleType, shape: tuple[int, ...]) -> tuple[list[np.ndarray], list[bytes]]:
    """Tensors of other sizes, starts and strengths, coded."""
    q = [drawn(shape, scale, seed) for seed, scale in enumerate((0.2, 0.5, 2, 3, 4))]
    settings = {"distance": 1} if form is predicted else {}
    return q, [form.encode(each, shape, (seed % 3,), **settings) for seed, each in enumerate(q)]


@FORMS
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (1, 1, 3, 3), (40, 30, 3, 3), (3, 70, 1, 5)])
def test_side_by_side_gives_what_each_gives_alone(form: ModuleType, shape: tuple[int, ...]) -> None:
    q, coded = streams(form, shape)
    for one, stream, found in zip(q, coded, form.decode(coded, shape), strict=True):
        assert np.array_equal(found, one)
        assert np.array_equal(form.decode([stream], shape)[0], one)


@pytest.mark.parametrize("shape", [(50,), (9, 13), (4, 300), (7, 6, 2), (3, 2, 40)])
def test_contexts_side_by_side_where_there_are_no_kernels(shape: tuple[int, ...]) -> None:
    q, coded = streams(contexts, shape)
    assert all(np.array_equal(*pair) for pair in zip(contexts.decode(coded, shape), q, strict=True))


@FORMS
def test_only_what_is_alike_goes_together(form: ModuleType) -> None:
    shape = (8, 8, 3, 3)
    seen: list[tuple[int, tuple[int, ...]]] = []

    class Watched:
        alike, side_by_side = staticmethod(form.alike), staticmethod(form.side_by_side)

        @staticmethod
        def decode(coded: list[bytes], shape: tuple[int, ...]) -> list[np.ndarray]:
            seen.append((len(coded), shape))
            return form.decode(coded, shape)

    q, coded = streams(form, shape)
    large = drawn(shape, 60, 9) * 15
    more = [form.encode(large, shape, (1,)), form.encode(drawn((4, 8, 3, 3), 2, 0), (4, 8, 3, 3), (1,))]
    works = [together.numbers_of(Watched, each, shape) for each in (*coded, more[0])]
    works.append(together.numbers_of(Watched, more[1], (4, 8, 3, 3)))
    for threads in (1, 3):
        seen.clear()
        works = [together.numbers_of(Watched, each, shape) for each in (*coded, more[0])]
        found = together.all_decoded([*works, together.numbers_of(Watched, more[1], (4, 8, 3, 3))], threads)
        assert all(np.array_equal(*pair) for pair in zip(found, [*q, large], strict=False))
        assert {size for size, _ in seen} > {1}
        assert all(size == 1 for size, its in seen if its != shape)
        assert max(size for size, _ in seen) <= len(coded)


@FORMS
def test_few_large_tensors_and_many_small_ones(form: ModuleType) -> None:
    small, large = (4, 4, 3, 3), (512, 512, 3, 3)
    stream = form.encode(drawn(small, 1, 0), small, (1,))
    assert form.side_by_side(stream, small) >= 32
    assert form.side_by_side(stream, large) == 1


@FORMS
def test_one_that_is_wrong_is_found_among_the_others(form: ModuleType) -> None:
    shape = (6, 5, 3, 3)
    q, coded = streams(form, shape)
    coded[2] += struct.pack("<I", 1)
    caught = []

    def work(index: int) -> together.Decoding[np.ndarray]:
        try:
            return (yield from together.numbers_of(form, coded[index], shape))
        except ValueError as error:
            caught.append(index)
            raise RuntimeError(f"tensor {index}") from error

    with pytest.raises(RuntimeError, match="tensor 2"):
        together.all_decoded([work(index) for index in range(5)])
    assert caught == [2]
    others = together.all_decoded([work(index) for index in (0, 1, 3, 4)])
    assert all(np.array_equal(*pair) for pair in zip(others, [q[index] for index in (0, 1, 3, 4)], strict=True))


def test_frequencies_sum_up() -> None:
    weights = np.array([[1, 5, 2**30], [3, 3, 3]])
    found = entropy.shares(weights.copy(), 2**24 - 3)
    assert found.sum(1).tolist() == [2**24 - 3] * 2
    assert found.min() >= 0


def test_the_largest_counts_leave_no_room_for_overflow() -> None:
    models = adaptive.Models(3, [-255], [255], lambda _, key: np.full(511, key + 1))
    models.shares(np.array([1]))
    models.weights[1][7] += adaptive.COUNT * numbers.LONGEST
    (found,) = models.shares(np.array([1]))
    assert found.min() >= 0
    assert found.sum() == (1 << entropy.PRECISION) - 511
    assert found.argmax() == 7
