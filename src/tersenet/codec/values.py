"""From the elements of a tensor to small whole numbers, and back bit for bit: grids, codebooks and masks.

A grid is a float32 step times a whole number, with one step for the tensor or one per row (output channel). A
codebook is a list of at most 256 values. Nobody has to say that a tensor is on a grid: the step is found from the
values, and taken when every product gives back its value exactly. Elements are handled as their bits, so that NaN
and -0.0 survive.
"""

from __future__ import annotations

import struct
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from tersenet.codec import floats, numbers
from tersenet.codec.together import Decoding

Bits = NDArray[np.unsignedinteger]
Forms = Collection[str] | None  # of `numbers`, the only ones to take

LARGEST_BOOK = 256
_PARTS = 4  # of the smallest difference, that may be the step


def encode_grid(bits: Bits, shape: tuple[int, ...], forms: Forms = None) -> tuple[bytes | None, float]:
    """(n,) float32 bits, n at least 1: 0, the step, numbers; or 1, bytes of the steps (uint32), steps, numbers.
    None where they are on no grid. Beside it the share of the numbers between the smallest and the largest that come.
    """
    values = bits.view("<f4")
    found = grid_of(values)
    if found is None:
        return _encode_rows(values, shape, forms), 1.0
    whole = struct.pack("<Bf", 0, found[0]) + numbers.encode(found[1], shape, forms)
    if len(shape) < 2 or len(values) < 8 * shape[0] or not _coarser(found[1].reshape(shape[0], -1)):
        return whole, share(found[1])
    # Steps of rows that have a common part are one grid together, but a fine one.
    apart = _encode_rows(values, shape, forms)
    return (whole, share(found[1])) if apart is None or len(apart) >= len(whole) else (apart, 1.0)


def _coarser(q: NDArray[np.int32]) -> bool:
    """Whether a quarter of the rows that are not all zeros have a step of their own, larger than that of all."""
    common = np.gcd.reduce(q, axis=1)
    return 4 * int(np.count_nonzero(common > 1)) >= max(1, int(np.count_nonzero(common)))


def _encode_rows(values: NDArray[np.float32], shape: tuple[int, ...], forms: Forms) -> bytes | None:
    if len(shape) < 2 or len(values) < 8 * shape[0] or grid_of(values[: len(values) // shape[0]]) is None:
        return None
    rows = [grid_of(row) for row in values.reshape(shape[0], -1)]
    kept = [row for row in rows if row is not None]
    if len(kept) < len(rows):
        return None
    coded = floats.encode(np.array([step for step, _ in kept], "<f4").view("<u4"))
    q = np.concatenate([row for _, row in kept])
    return struct.pack("<BI", 1, len(coded)) + coded + numbers.encode(q, shape, forms)


def share(q: NDArray[np.int32]) -> float:
    """Of the numbers between the smallest and the largest, how many come."""
    come = np.bincount(q - q.min())
    return np.count_nonzero(come) / len(come)


def form_of_grid(payload: bytes) -> str:
    """The form, of `numbers.FORMS`, of the numbers that `encode_grid` coded with one step."""
    return numbers.FORMS[payload[5]]


def decode_grid(payload: bytes, shape: tuple[int, ...], count: int) -> Decoding[Bits]:
    """Returns the (count,) float32 bits. Raises ValueError when the payload cannot be one of ours."""
    if len(payload) < 5 or payload[0] > 1 or (payload[0] and not shape):
        raise ValueError("a grid is malformed")
    stop, rows = 5, 1
    if payload[0]:
        rows = shape[0]
        stop += int.from_bytes(payload[1:5], "little")
        steps = floats.decode(payload[5:stop], 4, rows).view("<f4")
    else:
        steps = np.frombuffer(payload[1:5], "<f4")
    q = yield from numbers.decode(payload[stop:], shape, count)
    with np.errstate(all="ignore"):  # steps of a hostile file may be anything
        return np.multiply(q.astype("<f4").reshape(rows, -1), steps[:, None], dtype="<f4").reshape(-1).view("<u4")


def grid_of(values: NDArray[np.float32]) -> tuple[np.float32, NDArray[np.int32]] | None:
    """The step and the numbers whose products are the values, bit for bit."""
    if len(values) > 65536 and grid_of(values[:: len(values) // 4096]) is None:
        return None  # a sample tells most tensors that are on no grid
    magnitudes = np.unique(np.abs(values))
    if not np.isfinite(magnitudes[-1]) or len(magnitudes) > numbers.LIMIT + 1:
        return None
    magnitudes = magnitudes[magnitudes > 0].astype(np.float64)
    if not len(magnitudes):
        return (np.float32(1), np.zeros(len(values), np.int32)) if not values.view("<u4").any() else None
    gap = np.diff(magnitudes, prepend=0).min()
    for parts in range(1, _PARTS + 1):  # of 3, 5 and 8 steps no two are one step apart
        largest = np.rint(magnitudes[-1] / gap * parts)
        if largest > numbers.LIMIT:
            return None
        near = np.float32(magnitudes[-1] / largest)
        below, above = np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))
        for step in (near, below, above, np.float32(magnitudes[0])):
            if not step > 0 or not np.isfinite(step):
                continue
            multiples = np.rint(magnitudes / np.float64(step))
            if multiples[-1] <= numbers.LIMIT and np.array_equal(multiples.astype(np.float32) * step, magnitudes):
                q = np.rint(values.astype(np.float64) / np.float64(step)).astype(np.int32)
                if np.array_equal((q.astype(np.float32) * step).view(np.uint32), values.view(np.uint32)):
                    return step, q
    return None


def encode_codebook(bits: Bits, shape: tuple[int, ...], kind: str, forms: Forms = None) -> bytes | None:
    """(n,) bits, n at least 1: values less 1 (a byte), the one that is number 0 (a byte), the values, the numbers.

    Args:
        kind: of the bits: "float", "signed" or "unsigned". The book is in order of value, and number 0 is what is
            nearest to 0, because the coder of numbers looks for sizes like those of neighbours.
    """
    if len(bits) > 65536 and len(np.unique(bits[:: len(bits) // 4096])) > LARGEST_BOOK:
        return None
    book, index = np.unique(bits, return_inverse=True)
    if len(book) > LARGEST_BOOK:
        return None
    top = book.dtype.type(1 << (8 * book.dtype.itemsize - 1))
    negative = np.zeros(len(book), bool) if kind == "unsigned" else book >= top
    below = np.flatnonzero(negative)  # the larger these bits, the lower a float and the higher an integer
    order = np.concatenate([below[::-1] if kind == "float" else below, np.flatnonzero(~negative)])
    rank = np.empty(len(book), np.int32)
    rank[order] = np.arange(len(book))
    sizes = np.where(negative, book & ~top if kind == "float" else ~book + 1, book)
    zero = int(rank[np.argmin(sizes)])
    head = struct.pack("<BB", len(book) - 1, zero)
    return head + book[order].tobytes() + numbers.encode(rank[index.reshape(-1)] - zero, shape, forms)


def decode_codebook(payload: bytes, size: int, shape: tuple[int, ...], count: int) -> Decoding[Bits]:
    """Returns the (count,) bits of `size` bytes. Raises ValueError when the payload cannot be one of ours."""
    stop = 2 + (payload[0] + 1) * size if payload else 2
    if len(payload) < stop:
        raise ValueError("a codebook ends early")
    book = np.frombuffer(payload[2:stop], f"<u{size}")
    index = yield from numbers.decode(payload[stop:], shape, count)
    index = index + payload[1]
    if index.min() < 0 or index.max() >= len(book):
        raise ValueError(f"an index goes beyond a codebook of {len(book)}")
    return book[index]


def encode_sparse(bits: Bits, shape: tuple[int, ...], forms: Forms = None) -> bytes | None:
    """(n,) bits of floats, some of them 0: bytes of the mask (uint32), the mask as numbers, what is not 0 as floats."""
    kept = bits != 0
    count = int(np.count_nonzero(kept))
    if not 0 < count < 0.95 * len(bits):
        return None
    mask = numbers.encode(kept.astype(np.int32), shape, forms)
    return struct.pack("<I", len(mask)) + mask + floats.encode(bits[kept])


def decode_sparse(payload: bytes, size: int, shape: tuple[int, ...], count: int) -> Decoding[Bits]:
    """Returns the (count,) bits of `size` bytes. Raises ValueError when the payload cannot be one of ours."""
    if len(payload) < 4:
        raise ValueError("a mask ends early")
    (length,) = struct.unpack_from("<I", payload)
    if length > len(payload) - 4:
        raise ValueError(f"a mask of {length} bytes has only {len(payload) - 4} left")
    mask = yield from numbers.decode(payload[4 : 4 + length], shape, count)
    if mask.min() < 0 or mask.max() > 1:
        raise ValueError("a mask is neither 0 nor 1")
    kept = mask.astype(bool)
    out = np.zeros(count, f"<u{size}")
    out[kept] = floats.decode(payload[4 + length :], size, int(np.count_nonzero(kept)))
    return out
