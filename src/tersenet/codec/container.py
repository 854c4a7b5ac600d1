"""The .terse container: a JSON manifest and named tensors in one file, checked before anything is allocated.

docs/format.md gives it byte by byte. In short: 28 bytes of header, a head (JSON: the manifest and the tensor table),
the payloads one after another in the table's order, and the SHA-256 of all that. Nothing in a file names code.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from tersenet.atomic import writing
from tersenet.codec import floats, integers
from tersenet.errors import ExportError, FileError

MAGIC = b"TERSE"
VERSION = 1
HEADER = struct.Struct("<5sBBxQIII")  # magic, version, flags, file length, head stored, head decoded, CRC-32 of head
DEFLATED = 1  # flag: the head is a zlib stream
MAX_HEAD = 64 << 20
MAX_TENSORS = 1_000_000
MAX_RANK = 32
_DIGEST = 32
_CHUNK = 1 << 20

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
SIGNED = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64}
UNSIGNED = {"uint8": torch.uint8, "bool": torch.bool}
DTYPES = {**FLOATS, **SIGNED, **UNSIGNED}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Blob:
    """One coded tensor as the table has it; several names may share it."""

    dtype: str
    shape: tuple[int, ...]
    codec: str  # "raw", "floats" or "integers"
    length: int  # bytes of the payload
    crc: int  # CRC-32 of the payload
    decoded_crc: int  # CRC-32 of the decoded bytes, little-endian
    offset: int = 0  # from the start of the file

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def decoded(self) -> int:
        return self.count * self.itemsize


@dataclass(frozen=True)
class Contents:
    """What a file says about itself, without its tensors decoded."""

    manifest: dict[str, Any]
    names: dict[str, int]  # tensor name -> index in blobs
    blobs: tuple[Blob, ...]
    file_bytes: int
    head_bytes: int

    def rows(self) -> list[dict[str, Any]]:
        """One row per tensor name, for a table: bytes as stored and as decoded. A shared payload counts once."""
        rows, seen = [], set()
        for name, index in self.names.items():
            blob = self.blobs[index]
            rows.append(
                {
                    "name": name, "dtype": blob.dtype, "shape": list(blob.shape), "codec": blob.codec,
                    "offset": blob.offset, "bytes": 0 if index in seen else blob.length, "decoded_bytes": blob.decoded,
                }
            )  # fmt: skip
            seen.add(index)
        return rows


def write(path: str | Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes a file whole or not at all. The same input gives the same bytes.

    Args:
        manifest: anything JSON can say (no NaN).
        tensors: by name; dense, on any device. Equal tensors are stored once.
    Raises:
        ExportError: for a manifest that is not JSON, or a tensor of a kind that the format does not have.
    """
    data = pack(manifest, tensors)
    with writing(path) as temporary:
        temporary.write_bytes(data)


def pack(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """The bytes of the file that `write` writes."""
    names: list[list[Any]] = []
    blobs: list[list[Any]] = []
    payloads: list[bytes] = []
    known: dict[tuple[Any, ...], int] = {}
    for name, tensor in tensors.items():
        dtype, data = _bytes_of(name, tensor)
        shape = list(tensor.shape)
        key = (dtype, tuple(shape), hashlib.sha256(data.tobytes()).digest())
        if key not in known:
            codec, payload = _encode(dtype, data)
            known[key] = len(blobs)
            blobs.append([dtype, shape, codec, len(payload), zlib.crc32(payload), zlib.crc32(data.data)])
            payloads.append(payload)
        names.append([name, known[key]])
    try:
        text = json.dumps(
            {"manifest": manifest, "names": names, "blobs": blobs},
            sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False,
        ).encode("utf-8")  # fmt: skip
    except (TypeError, ValueError, RecursionError) as error:
        raise ExportError(f"the manifest of a .terse file must be plain JSON, and is not: {error}") from None
    if len(text) > MAX_HEAD:
        raise ExportError(f"the manifest takes {len(text)} bytes; a .terse file can hold {MAX_HEAD}")
    deflated = zlib.compress(text, 9)
    flags, head = (DEFLATED, deflated) if len(deflated) < len(text) else (0, text)
    length = HEADER.size + len(head) + sum(map(len, payloads)) + _DIGEST
    header = HEADER.pack(MAGIC, VERSION, flags, length, len(head), len(text), zlib.crc32(head))
    body = b"".join([header, head, *payloads])
    return body + hashlib.sha256(body).digest()


def read(path: str | Path, max_bytes: int | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and the tensors (on the CPU, in the file's order).

    Args:
        max_bytes: the most that the decoded tensors may take together; by default 16 MiB and 1024 times the file.
    Raises:
        FileError: when the file is damaged, truncated, hostile or no .terse file; says where.
    """
    with _opened(path) as file:
        contents, digest = _contents(path, file)
        limit = (16 << 20) + 1024 * contents.file_bytes if max_bytes is None else max_bytes
        total = 0
        for blob in contents.blobs:
            total += blob.decoded
            if total > limit:
                raise _bad(
                    path, blob.offset, f"it declares more than {limit} bytes of tensors; allow more with max_bytes"
                )
        found = []
        for blob in contents.blobs:
            payload = file.read(blob.length)
            digest.update(payload)
            found.append(_decode(path, blob, payload))
        if file.read(_DIGEST) != digest.digest():
            raise _bad(path, contents.file_bytes - _DIGEST, "the checksum of the whole file does not match")
    tensors, taken = {}, set()
    for name, index in contents.names.items():
        tensors[name] = found[index].clone() if index in taken else found[index]  # equal, and still independent
        taken.add(index)
    return contents.manifest, tensors


def inspect(path: str | Path) -> Contents:
    """The manifest and the tensor table; no payload is read. Raises FileError as `read` does."""
    with _opened(path) as file:
        return _contents(path, file)[0]


def _bytes_of(name: str, tensor: Tensor) -> tuple[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    """The dtype's name and the elements' little-endian bytes, in row-major order."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.dtype not in _NAMES or tensor.is_meta:
        raise ExportError(
            f"tensor {name} is {tensor.layout} of {tensor.dtype} on {tensor.device.type}; a .terse file holds dense "
            f"tensors of {', '.join(DTYPES)}"
        )
    if not name:
        raise ExportError("a tensor has an empty name; give every tensor a name")
    flat = tensor.detach().cpu().contiguous().resolve_neg().reshape(-1)
    return _NAMES[tensor.dtype], flat.view(torch.uint8).numpy()


def _encode(dtype: str, data: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[str, bytes]:
    bits = data.view(f"<u{DTYPES[dtype].itemsize}")
    if dtype in FLOATS:
        codec, payload = "floats", floats.encode(bits)
    else:
        codec, payload = "integers", integers.encode(bits, dtype in SIGNED)
    return (codec, payload) if len(payload) < len(data) else ("raw", data.tobytes())


def _decode(path: str | Path, blob: Blob, payload: bytes) -> Tensor:
    if len(payload) != blob.length or zlib.crc32(payload) != blob.crc:
        raise _bad(path, blob.offset, "the checksum of a payload does not match")
    try:
        if blob.codec == "raw":
            if blob.length != blob.decoded:
                raise ValueError(f"{blob.length} raw bytes for {blob.decoded} declared")
            bits = np.frombuffer(payload, f"<u{blob.itemsize}")
        elif blob.codec == "floats":
            bits = floats.decode(payload, blob.itemsize, blob.count)
        else:
            bits = integers.decode(payload, blob.itemsize, blob.count, blob.dtype in SIGNED)
    except ValueError as error:
        raise _bad(path, blob.offset, f"a payload cannot be decoded, {error}") from None
    data = bits.view(np.uint8)
    if zlib.crc32(data.data) != blob.decoded_crc:
        raise _bad(path, blob.offset, "the checksum of the decoded values does not match")
    if blob.dtype == "bool" and blob.count and data.max() > 1:
        raise _bad(path, blob.offset, "a boolean is neither 0 nor 1")
    if not blob.count:
        return torch.empty(blob.shape, dtype=DTYPES[blob.dtype])
    if not data.flags.writeable:
        data = data.copy()
    return torch.from_numpy(data).view(DTYPES[blob.dtype]).reshape(blob.shape)


def _opened(path: str | Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from None


def _contents(path: str | Path, file: BinaryIO) -> tuple[Contents, Any]:
    """Header and head, checked; the file stands at its first payload, the digest has seen what came before."""
    size = os.fstat(file.fileno()).st_size
    header = file.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC:
        raise _bad(path, 0, "it is no .terse file")
    if len(header) < HEADER.size:
        raise _bad(path, len(header), "it ends within its header")
    _, version, flags, length, stored, decoded, crc = HEADER.unpack(header)
    if version != VERSION or header[7]:
        raise _bad(path, 5, f"it is of version {version}, and this tersenet reads version {VERSION}; update tersenet")
    if flags & ~DEFLATED:
        raise _bad(path, 6, f"its flags are {flags}, allowed are 0 and 1")
    if length != size:
        raise _bad(path, min(size, length), f"it has {size} bytes and declares {length}; it was truncated or added to")
    if stored > size - HEADER.size - _DIGEST or decoded > min(MAX_HEAD, (1 << 20) + 32 * stored):
        raise _bad(path, 16, f"its head of {stored} bytes, {decoded} decoded, is larger than the format allows")
    head = file.read(stored)
    if len(head) != stored or zlib.crc32(head) != crc:
        raise _bad(path, HEADER.size, "the checksum of its head does not match")
    try:
        fields = _json(_inflate(head, decoded) if flags & DEFLATED else head, decoded)
        manifest, blobs, names = _checked(fields, HEADER.size + stored, size - _DIGEST)
    except (ValueError, RecursionError, zlib.error) as error:
        raise _bad(path, HEADER.size, f"its head is malformed, {error or 'nested too deeply'}") from None
    return Contents(manifest, names, blobs, size, stored), hashlib.sha256(header + head)


def _inflate(head: bytes, decoded: int) -> bytes:
    stream = zlib.decompressobj()
    text = stream.decompress(head, decoded + 1)
    if not stream.eof or stream.unused_data or len(text) != decoded:
        raise ValueError("its length is not what the header declares")
    return text


def _json(text: bytes, decoded: int) -> Any:
    if len(text) != decoded:
        raise ValueError("its length is not what the header declares")

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    return json.load(io.StringIO(text.decode("utf-8")), parse_constant=refuse)


def _checked(fields: Any, start: int, stop: int) -> tuple[dict[str, Any], tuple[Blob, ...], dict[str, int]]:
    """The head's three fields, each entry's type and range checked. The payloads must fill start..stop exactly."""
    _want(isinstance(fields, dict) and set(fields) == {"manifest", "names", "blobs"}, "its fields are not the format's")
    manifest, names, blobs = fields["manifest"], fields["names"], fields["blobs"]
    _want(isinstance(manifest, dict), "the manifest is no object")
    _want(isinstance(names, list) and isinstance(blobs, list), "the tensor table is no list")
    _want(max(len(names), len(blobs)) <= MAX_TENSORS, f"there are more than {MAX_TENSORS} tensors")
    found = []
    for entry in blobs:
        _want(isinstance(entry, list) and len(entry) == 6, "a blob has not its six fields")
        dtype, shape, codec, length, crc, decoded_crc = entry
        _want(isinstance(dtype, str) and dtype in DTYPES, "a blob's dtype is unknown")
        _want(isinstance(shape, list) and len(shape) <= MAX_RANK, "a blob's shape is malformed")
        _want(all(_whole(size, 1 << 48) for size in shape), "a blob's shape is malformed")
        # Also without its zeros: torch multiplies the other sizes of an empty tensor for its strides.
        _want(math.prod(size for size in shape if size) <= 1 << 48, "a blob has more elements than allowed")
        codecs = ("raw", "floats" if dtype in FLOATS else "integers")
        _want(isinstance(codec, str) and codec in codecs, f"a blob's codec is unknown for {dtype}")
        _want(all(_whole(crc, 1 << 32) for crc in (crc, decoded_crc)), "a checksum is malformed")
        _want(_whole(length, stop - start + 1), "a payload reaches beyond the file")
        found.append(Blob(dtype, tuple(shape), codec, length, crc, decoded_crc, start))
        start += length
    _want(start == stop, f"its payloads end at byte {start}, not at {stop}")
    index: dict[str, int] = {}
    for entry in names:
        _want(isinstance(entry, list) and len(entry) == 2, "a tensor's entry is malformed")
        name, blob = entry
        _want(isinstance(name, str) and bool(name) and name not in index, "a tensor's name is empty or comes twice")
        _want(_whole(blob, len(found)), "a tensor has no blob")
        index[name] = blob
    _want(set(index.values()) == set(range(len(found))), "a blob has no name")
    return manifest, tuple(found), index


def _want(true: bool, otherwise: str) -> None:
    if not true:
        raise ValueError(otherwise)


def _whole(value: Any, below: int) -> bool:
    return type(value) is int and 0 <= value < below


def _bad(path: str | Path, offset: int, what: str) -> FileError:
    return FileError(f"{path} cannot be used: at byte {offset}, {what}")
