"""Integers and booleans without loss: byte planes of the offset values.

Signed integers have their sign bit flipped (v + 2**(bits - 1)), so that -1 and 0 are neighbours: the histogram of
int8 weights is then one smooth hill, which is what the adaptive model of `entropy` expects.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tersenet.codec import planes


def encode(bits: NDArray[np.unsignedinteger], signed: bool) -> bytes:
    """bits: (n,) the numbers' own bits, two's complement when `signed`."""
    return planes.encode(_offset(bits) if signed else bits)


def decode(payload: bytes, size: int, count: int, signed: bool) -> NDArray[np.unsignedinteger]:
    """The (count,) bit patterns of `size` bytes. Raises ValueError when the payload cannot be one of ours."""
    bits = planes.decode(payload, size, count)
    return _offset(bits) if signed else bits


def _offset(bits: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    return bits ^ bits.dtype.type(1 << (bits.dtype.itemsize * 8 - 1))
