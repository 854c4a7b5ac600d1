"""Small whole numbers: every form gives them back, the smallest is taken, and a damaged stream is refused."""

from __future__ import annotations

import math
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersenet.codec import contexts, huffman, numbers
from tersenet.codec.together import decoded

FORMS = [form for form in numbers.FORMS if form != "constant"]


def drawn(shape: tuple[int, ...], zeros: float = 0.0, scale: float = 2.0, seed: int = 0) -> np.ndarray:
    """Laplace numbers whose scale differs by row and column, some of them 0."""
    chance = np.random.default_rng(seed)
    rows = chance.gamma(2, 0.5, (shape[0], *[1] * (len(shape) - 1)))
    q = np.rint(chance.laplace(0, scale, shape) * rows) * (chance.random(shape) >= zeros)
    return np.clip(q, -255, 255).astype(np.int32).reshape(-1)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(-255, 255),
    st.integers(1, 510),
    st.integers(0, 2**32 - 1),
)
def test_every_form_gives_any_numbers_back(form: str, shape: list[int], low: int, span: int, seed: int) -> None:
    count = math.prod(shape)
    q = np.random.default_rng(seed).integers(low, min(255, low + span) + 1, count).astype(np.int32)
    stream = numbers.encode(q, tuple(shape), (form,))
    assert np.array_equal(decoded(numbers.decode(stream, tuple(shape), count)), q)
    assert stream == numbers.encode(q, tuple(shape), (form,))


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("shape", [(3,), (40, 30), (12, 5, 3, 3), (6, 3, 11, 11)])
def test_by_default_the_smallest_form_is_taken(shape: tuple[int, ...], zeros: float) -> None:
    q = drawn(shape, zeros)
    best = min(len(numbers.encode(q, shape, (form,))) for form in FORMS)
    stream = numbers.encode(q, shape)
    assert len(stream) <= best
    assert np.array_equal(decoded(numbers.decode(stream, shape, len(q))), q)


def test_the_smallest_form_of_sparse_kernels_is_taken() -> None:
    """Few numbers in most kernels, many in some, as pruning leaves them."""
    chance, shape = np.random.default_rng(0), (40, 32, 3, 3)
    share = chance.choice([0.02, 0.5], (40, 32, 1, 1), p=[0.8, 0.2])
    q = np.rint(chance.laplace(0, 3, shape) * (chance.random(shape) < share)).astype(np.int32).reshape(-1)
    assert 8 * np.count_nonzero(q) < len(q)
    assert len(numbers.encode(q, shape)) == min(len(numbers.encode(q, shape, (form,))) for form in FORMS)


def test_contexts_find_scales_of_rows_and_columns() -> None:
    """Rows of two scales: near the mean of the two entropies, which no code without contexts can reach."""
    chance = np.random.default_rng(0)
    scale = np.where(np.arange(64) % 2, 0.3, 8.0)
    q = np.rint(chance.laplace(0, 1, (64, 64, 3, 3)) * scale[:, None, None, None]).clip(-60, 60).astype(np.int32)

    def entropy_bytes(values: np.ndarray) -> float:
        share = np.unique(values, return_counts=True)[1] / values.size
        return float(-(share * np.log2(share)).sum() * values.size / 8)

    apart = entropy_bytes(q[0::2]) + entropy_bytes(q[1::2])
    size = len(numbers.encode(q.reshape(-1), q.shape, ("contexts",)))
    assert size < 1.07 * apart
    assert size < 0.9 * entropy_bytes(q)


def test_significance_finds_dead_columns() -> None:
    q = drawn((300, 200), 0.9)
    q.reshape(300, 200)[:, ::2] = 0
    flat = len(numbers.encode(q, (len(q),), ("significant",)))
    assert len(numbers.encode(q, (300, 200), ("significant",))) < 0.95 * flat


def test_huffman_is_optimal_and_canonical() -> None:
    counts = [45, 13, 12, 16, 9, 5]  # the example of Cormen et al., Introduction to Algorithms: 224 bits
    lengths = huffman.code_lengths(counts)
    assert sum(count * length for count, length in zip(counts, lengths, strict=True)) == 224
    assert huffman.canonical(lengths) == [0b0, 0b100, 0b101, 0b110, 0b1110, 0b1111]


def test_huffman_codes_stay_within_16_bits() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = huffman.code_lengths(fibonacci)
    assert max(lengths) <= 16
    assert sum(2.0**-length for length in lengths) <= 1


def test_long_huffman_streams_come_back() -> None:
    """More than is looked at together."""
    symbols = np.random.default_rng(0).geometric(0.2, 200_000).clip(max=300) - 1
    assert np.array_equal(huffman.decode(huffman.encode(symbols), len(symbols)), symbols)


def test_relative_indices_are_those_of_the_paper() -> None:
    """Figure 2 of arXiv:1510.00149: gaps of 3 bits, and a filler of 0 where there are more than 8 places."""
    q = np.zeros(16, np.int32)
    q[[1, 4, 15]] = [34, 9, 17]  # 3.4, 0.9, 1.7
    stream = huffman.encode_relative(q, 3)
    assert np.array_equal(huffman.decode_relative(stream, 16), q)
    length = int.from_bytes(stream[7:11], "little")
    assert huffman.decode(stream[11 : 11 + length], 4).tolist() == [1, 2, 7, 2]  # the filler's gap is 7
    assert huffman.decode(stream[11 + length :], 4).tolist() == [34, 9, 0, 17]


def test_log16_and_power4_are_what_the_format_says() -> None:
    for x in [*range(1, 3000), 2**40 - 1, 2**40, 2**52 - 1, 2**52]:
        e = x.bit_length() - 1
        assert int(contexts.log16(np.array(x))) == contexts.log16_of_one(x) == 16 * e + ((x - 2**e) * 16 >> e)
    assert [contexts.power4(4 * e) for e in range(20)] == [2**e for e in range(20)]


def test_starting_models_have_the_mean_of_their_context() -> None:
    for context in range(12, 34):
        for low in (-255, 0):
            weights = np.array(contexts.starting_model(context, low, 255, 2)) - 1
            values = np.abs(np.arange(low, 256))
            mean = (weights * values).sum() / weights.sum()
            assert mean == pytest.approx(contexts.power4(2 * context) / contexts.UNIT, rel=0.35)


def broken(form: str, tries: int) -> None:
    """Mutated and truncated streams give the right number of numbers within bounds, or ValueError."""
    shape = (9, 7, 3, 3)
    q = drawn(shape, 0.6)
    good = numbers.encode(q, shape, (form,))
    chance = random.Random(0)
    streams = [good[:length] for length in range(len(good))]
    for _ in range(tries):
        data = bytearray(good)
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(len(data)) if chance.random() < 0.5 else chance.randrange(16)
            data[at] = chance.choice((0, 1, 255, data[at] ^ (1 << chance.randrange(8)), chance.randrange(256)))
        streams.append(bytes(data) + bytes(chance.choice((0, 0, 0, 4))))
    tracemalloc.start()
    for stream in streams:
        try:
            found = decoded(numbers.decode(stream, shape, len(q)))
        except ValueError:
            continue
        assert len(found) == len(q)
        assert found.min() >= -2 * numbers.LIMIT
        assert found.max() <= 2 * numbers.LIMIT
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_stream_is_refused(form: str) -> None:
    broken(form, 200)


@pytest.mark.minutes
@pytest.mark.parametrize("form", FORMS)
def test_thousands_of_damaged_streams_are_refused(form: str) -> None:
    broken(form, 5000)
