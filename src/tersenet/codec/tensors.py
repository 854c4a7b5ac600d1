"""One tensor's elements as bytes, by whichever codec makes them smallest, and back bit for bit.

Which codecs are tried depends on the elements alone: nobody says that a tensor was clustered, put on a grid, made
ternary or pruned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tersenet.codec import floats, integers, numbers, values
from tersenet.codec.together import Decoding

Bits = NDArray[np.unsignedinteger]

FLOATS = ("float16", "bfloat16", "float32", "float64")
SIGNED = ("int8", "int16", "int32", "int64")
SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int8": 1, "int16": 2, "int32": 4, "int64": 8,
         "uint8": 1, "bool": 1}  # fmt: skip
_SMALL = 256  # elements; below this every codec is tried
_GAPS = 0.75  # share of a grid's numbers that come; below this a codebook of those alone is tried too


def codecs(dtype: str) -> tuple[str, ...]:
    """The codecs that a tensor of this dtype may have."""
    if dtype in FLOATS:
        return ("raw", "floats", "sparse", "codebook", *(("grid",) if dtype == "float32" else ()))
    return ("raw", "integers", "numbers", *(("codebook",) if dtype != "bool" else ()))


def encode(
    dtype: str, shape: tuple[int, ...], data: NDArray[np.uint8], forms: values.Forms = None
) -> tuple[str, bytes]:
    """The codec's name and the payload, of a tensor's little-endian bytes in row-major order. Deterministic.

    Args:
        forms: of `numbers`, the only ones to take; by default all that may be smallest.
    """
    raw = data.tobytes()
    if not raw:
        return "raw", raw
    bits = data.view(f"<u{SIZES[dtype]}")
    best = ("raw", raw)
    for codec, payload in (
        _floats(dtype, shape, bits, forms) if dtype in FLOATS else _integers(dtype, shape, bits, forms)
    ):
        if payload is not None and len(payload) < len(best[1]):
            best = (codec, payload)
    return best


def _floats(dtype: str, shape: tuple[int, ...], bits: Bits, forms: values.Forms) -> Iterator[tuple[str, bytes | None]]:
    small = len(bits) < _SMALL
    grid = book = None
    gaps = False
    if dtype == "float32" and len(bits) <= numbers.LONGEST:
        grid, share = values.encode_grid(bits, shape, forms)
        gaps = share < _GAPS
        yield "grid", grid
    if grid is None or gaps or small:
        if grid is not None and not small:
            # The book's numbers are the grid's without its gaps: no other form is likely.
            forms = (values.form_of_grid(grid),)
        book = values.encode_codebook(bits, shape, "float", forms)
    yield "codebook", book
    if small or (grid is None and book is None):
        if 50 * (len(bits) - int(np.count_nonzero(bits))) > len(bits):
            yield "sparse", values.encode_sparse(bits, shape, forms)
        yield "floats", floats.encode(bits)


def _integers(
    dtype: str, shape: tuple[int, ...], bits: Bits, forms: values.Forms
) -> Iterator[tuple[str, bytes | None]]:
    whole = bits.view(f"<i{SIZES[dtype]}" if dtype in SIGNED else bits.dtype)
    kind = "signed" if dtype in SIGNED else "unsigned"
    if int(whole.min()) >= -numbers.LIMIT and int(whole.max()) <= numbers.LIMIT and len(bits) <= numbers.LONGEST:
        q = whole.astype(np.int32)
        yield "numbers", numbers.encode(q, shape, forms)
        if dtype != "bool" and values.share(q) < _GAPS:  # as of few-bit weights, kept as multiples of a power of two
            yield "codebook", values.encode_codebook(bits, shape, kind, forms)
        if len(bits) >= _SMALL or forms is not None:
            return
    elif SIZES[dtype] > 1:
        yield "codebook", values.encode_codebook(bits, shape, kind, forms)
    yield "integers", integers.encode(bits, dtype in SIGNED)


def decode(dtype: str, shape: tuple[int, ...], codec: str, payload: bytes) -> Decoding[NDArray[np.uint8]]:
    """Returns the tensor's bytes; `together.decoded` gives them for one tensor alone.

    Raises:
        ValueError: when the payload cannot be one of ours; says why.
    """
    count, size = math.prod(shape), SIZES[dtype]
    if codec == "raw":
        if len(payload) != count * size:
            raise ValueError(f"{len(payload)} raw bytes for {count * size} declared")
        return np.frombuffer(payload, np.uint8)
    if not count:
        raise ValueError("a tensor without elements is not raw")
    if codec == "floats":
        bits = floats.decode(payload, size, count)
    elif codec == "integers":
        bits = integers.decode(payload, size, count, dtype in SIGNED)
    elif codec == "sparse":
        bits = yield from values.decode_sparse(payload, size, shape, count)
    elif codec == "codebook":
        bits = yield from values.decode_codebook(payload, size, shape, count)
    elif codec == "grid":
        bits = yield from values.decode_grid(payload, shape, count)
    else:
        bits = _whole((yield from numbers.decode(payload, shape, count)), dtype)
    return np.ascontiguousarray(bits).view(np.uint8)


def _whole(q: NDArray[np.int32], dtype: str) -> Bits:
    info = np.iinfo(dtype) if dtype != "bool" else np.iinfo("uint8")
    if q.min() < info.min or q.max() > info.max:
        raise ValueError(f"a number is no {dtype}")
    return q.astype(f"<i{SIZES[dtype]}" if dtype in SIGNED else f"<u{SIZES[dtype]}").view(f"<u{SIZES[dtype]}")
