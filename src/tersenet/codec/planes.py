"""Numbers of several bytes as planes: all the first bytes, then all the second bytes, and so on, each its own stream.

Bytes of the same place look alike (exponents repeat, low mantissa bits are noise), so each plane gets the coding that
suits it. A payload is one stream per plane, most significant first, each but the last behind its length (uint32).
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from tersenet.codec import entropy


def encode(values: NDArray[np.unsignedinteger]) -> bytes:
    """values: (n,) little-endian unsigned integers of B bytes -> B streams."""
    size = values.dtype.itemsize
    bytes_nb = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)  # (n, B), least significant first
    streams = [entropy.encode(np.ascontiguousarray(bytes_nb[:, i])) for i in reversed(range(size))]
    return b"".join(struct.pack("<I", len(stream)) + stream for stream in streams[:-1]) + streams[-1]


def decode(payload: bytes, size: int, count: int) -> NDArray[np.unsignedinteger]:
    """The inverse: (count,) unsigned integers of `size` bytes.

    Raises:
        ValueError: when the payload cannot be one of ours.
    """
    bytes_nb = np.empty((count, size), np.uint8)  # (n, B)
    at = 0
    for i in reversed(range(size)):
        length = len(payload) - at
        if i:
            if length < 4:
                raise ValueError("the planes end early")
            (length,) = struct.unpack_from("<I", payload, at)
            at += 4
            if length > len(payload) - at:
                raise ValueError(f"a plane of {length} bytes has only {len(payload) - at} left")
        bytes_nb[:, i] = entropy.decode(payload[at : at + length], count)
        at += length
    return bytes_nb.reshape(-1).view(f"<u{size}")
