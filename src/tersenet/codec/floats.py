"""Floating-point numbers without loss: exponents coded, mantissas coded where that helps.

The bits are rotated left by one, so that the sign goes to the lowest place and the exponent fills the top plane alone
(float32, bfloat16). The exponents of trained weights need about 2.6 of their 8 bits; signs and mantissas are close
to noise. NaN payloads and -0.0 survive, since only bits are moved.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tersenet.codec import planes


def encode(bits: NDArray[np.unsignedinteger]) -> bytes:
    """bits: (n,) the numbers' own bits as unsigned integers."""
    top = bits.dtype.itemsize * 8 - 1
    return planes.encode(np.bitwise_or(bits << 1, bits >> top, dtype=bits.dtype))


def decode(payload: bytes, size: int, count: int) -> NDArray[np.unsignedinteger]:
    """The (count,) bit patterns of `size` bytes. Raises ValueError when the payload cannot be one of ours."""
    rotated = planes.decode(payload, size, count)
    return np.bitwise_or(rotated >> 1, rotated << (size * 8 - 1), dtype=rotated.dtype)
