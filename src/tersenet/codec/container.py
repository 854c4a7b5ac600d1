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
from numpy.typing import NDArray
from torch import Tensor

from tersenet.atomic import writing
from tersenet.codec import tensors as coding
from tersenet.codec.together import Decoding, all_decoded, decoded, each
from tersenet.codec.values import Forms
from tersenet.errors import ExportError, FileError

MAGIC = b"TERSE"
VERSION = 3
READABLE = (2, 3)  # version 3 adds the form "predicted" of numbers, and nothing else
HEADER = struct.Struct("<5sBBxQIII")  # magic, version, flags, file length, head stored, head decoded, CRC-32 of head
DEFLATED = 1  # flag: the head is a zlib stream
MAX_HEAD = 64 << 20
MAX_TENSORS = 1_000_000
MAX_RANK = 32
_DIGEST = 32
_FREELY = 4 << 20  # bytes of tensors that any file may declare

DTYPES = {name: getattr(torch, name) for name in coding.SIZES}
Bytes = NDArray[np.uint8]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Blob:
    """One coded tensor as the table has it; several names may share it."""

    dtype: str
    shape: tuple[int, ...]
    codec: str  # a name in `tensors.CODECS`
    length: int  # bytes of the payload
    crc: int  # CRC-32 of the decoded bytes, little-endian
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


def write(
    path: str | Path, manifest: dict[str, Any], tensors: dict[str, Tensor], threads: int = 1, forms: Forms = None
) -> None:
    """Writes a file whole or not at all. The same input gives the same bytes, with any number of threads.

    Args:
        manifest: anything JSON can say (no NaN).
        tensors: by name; dense, on any device. Equal tensors are stored once.
        threads: how many tensors are coded at a time.
        forms: names of `numbers.FORMS`, the only ones to take; by default all that may be smallest.
    Raises:
        ExportError: for a manifest that is not JSON, or a tensor of a kind that the format does not have.
    """
    data = pack(manifest, tensors, threads, forms)
    with writing(path) as temporary:
        temporary.write_bytes(data)


def pack(manifest: dict[str, Any], tensors: dict[str, Tensor], threads: int = 1, forms: Forms = None) -> bytes:
    """The bytes of the file that `write` writes."""
    names: list[list[Any]] = []
    different: list[tuple[str, tuple[int, ...], Bytes]] = []
    known: dict[tuple[Any, ...], int] = {}
    for name, tensor in tensors.items():
        dtype, data = _bytes_of(name, tensor)
        shape = tuple(tensor.shape)
        key = (dtype, shape, hashlib.sha256(data.tobytes()).digest())
        if key not in known:
            known[key] = len(different)
            different.append((dtype, shape, data))
        names.append([name, known[key]])
    coded = each(lambda entry: coding.encode(entry[0], entry[1], entry[2], forms), different, threads)
    payloads = [payload for _, payload in coded]
    blobs = [
        [dtype, list(shape), codec, len(payload), zlib.crc32(data.data)]
        for (dtype, shape, data), (codec, payload) in zip(different, coded, strict=True)
    ]
    head, flags, decoded = _head({"manifest": manifest, "names": names, "blobs": blobs})
    length = HEADER.size + len(head) + sum(map(len, payloads)) + _DIGEST
    header = HEADER.pack(MAGIC, VERSION, flags, length, len(head), decoded, zlib.crc32(head))
    body = b"".join([header, head, *payloads])
    return body + hashlib.sha256(body).digest()


def _head(fields: dict[str, Any]) -> tuple[bytes, int, int]:
    """The head as stored, its flags, and its length as JSON."""
    try:
        text = json.dumps(
            fields, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
        ).encode("utf-8")  # fmt: skip
    except (TypeError, ValueError, RecursionError) as error:
        raise ExportError(f"the manifest of a .terse file must be plain JSON, and is not: {error}") from None
    if len(text) > MAX_HEAD:
        raise ExportError(f"the manifest takes {len(text)} bytes; a .terse file can hold {MAX_HEAD}")
    deflated = zlib.compress(text, 9)
    return (deflated, DEFLATED, len(text)) if len(deflated) < len(text) else (text, 0, len(text))


@dataclass(frozen=True)
class Stored:
    """A file in memory, checked as a whole, its tensors not decoded yet."""

    path: str | Path
    contents: Contents
    payloads: tuple[bytes, ...]

    def empty(self, name: str) -> Tensor:
        """A tensor's shape and dtype, without its numbers (on the meta device)."""
        blob = self.contents.blobs[self.contents.names[name]]
        return torch.empty(blob.shape, dtype=DTYPES[blob.dtype], device="meta")

    def tensor(self, name: str) -> Tensor:
        """A tensor decoded, anew at each call. Raises FileError when its payload is damaged or hostile."""
        index = self.contents.names[name]
        return decoded(_decode(self.path, self.contents.blobs[index], self.payloads[index]))


def read(path: str | Path, max_bytes: int | None = None, threads: int = 1) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and the tensors (on the CPU, in the file's order).

    Args:
        max_bytes: the most that the decoded tensors may take together; by default 4 MiB and 1024 times the file.
        threads: how many tensors are decoded at a time.
    Raises:
        FileError: when the file is damaged, truncated, hostile or no .terse file; says where.
    """
    stored = read_coded(path, max_bytes)
    works = [_decode(path, *coded) for coded in zip(stored.contents.blobs, stored.payloads, strict=True)]
    found = all_decoded(works, threads)
    tensors, taken = {}, set()
    for name, index in stored.contents.names.items():
        tensors[name] = found[index].clone() if index in taken else found[index]  # equal, and still independent
        taken.add(index)
    return stored.contents.manifest, tensors


def read_coded(path: str | Path, max_bytes: int | None = None) -> Stored:
    """The file with its checksum verified, its tensors still coded; arguments and errors are those of `read`."""
    with _opened(path) as file:
        contents, digest = _contents(path, file)
        limit = _FREELY + 1024 * contents.file_bytes if max_bytes is None else max_bytes
        total = 0
        for blob in contents.blobs:
            total += blob.decoded
            if total > limit:
                raise _bad(
                    path, blob.offset, f"it declares more than {limit} bytes of tensors; allow more with max_bytes"
                )
        payloads = [file.read(blob.length) for blob in contents.blobs]
        for payload in payloads:
            digest.update(payload)
        if file.read(_DIGEST) != digest.digest():  # before any tensor is decoded
            raise _bad(path, contents.file_bytes - _DIGEST, "the checksum of the whole file does not match")
    return Stored(path, contents, tuple(payloads))


def inspect(path: str | Path) -> Contents:
    """The manifest and the tensor table; no payload is read. Raises FileError as `read` does."""
    with _opened(path) as file:
        return _contents(path, file)[0]


def _bytes_of(name: str, tensor: Tensor) -> tuple[str, Bytes]:
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


def _decode(path: str | Path, blob: Blob, payload: bytes) -> Decoding[Tensor]:
    try:
        data = yield from coding.decode(blob.dtype, blob.shape, blob.codec, payload)
    except ValueError as error:
        raise _bad(path, blob.offset, f"a payload cannot be decoded, {error}") from None
    if len(data) != blob.decoded or zlib.crc32(data.data) != blob.crc:
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
    if version not in READABLE or header[7]:
        raise _bad(path, 5, f"it is of version {version}, and this tersenet reads versions 2 and 3; write it anew")
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
        _want(isinstance(entry, list) and len(entry) == 5, "a blob has not its five fields")
        dtype, shape, codec, length, crc = entry
        _want(isinstance(dtype, str) and dtype in DTYPES, "a blob's dtype is unknown")
        _want(isinstance(shape, list) and len(shape) <= MAX_RANK, "a blob's shape is malformed")
        _want(all(_whole(size, 1 << 48) for size in shape), "a blob's shape is malformed")
        # Also without its zeros: torch multiplies the other sizes of an empty tensor for its strides.
        _want(math.prod(size for size in shape if size) <= 1 << 48, "a blob has more elements than allowed")
        _want(isinstance(codec, str) and codec in coding.codecs(dtype), f"a blob's codec is unknown for {dtype}")
        _want(_whole(crc, 1 << 32), "a checksum is malformed")
        _want(_whole(length, stop - start + 1), "a payload reaches beyond the file")
        found.append(Blob(dtype, tuple(shape), codec, length, crc, start))
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
