"""The container: what goes in comes out bit for bit, and nothing else does."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import random
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersenet.codec import container
from tersenet.codec import tensors as coding
from tersenet.errors import ExportError, FileError, TersenetError

KINDS = sorted(container.DTYPES)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(found) == list(expected) and all(
        found[name].dtype == tensor.dtype and found[name].shape == tensor.shape and bits(found[name]) == bits(tensor)
        for name, tensor in expected.items()
    )


def sample() -> dict[str, Tensor]:
    """A small file with every coding in it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, 3, 3, generator=generator)
    return {
        "weight": weight,
        "half": weight.half(),
        "int8": (weight * 30).to(torch.int8),
        "again": weight.clone(),
        "count": torch.tensor(7),
        "flags": weight.reshape(-1) > 0,
        "zeros": torch.zeros(50),
        "empty": torch.zeros(0, 3),
        "grid": (weight * 2).round() * 0.1 + 0.0,
        "book": torch.where(weight > 1, 0.3137, torch.where(weight < -1, -0.2111, 0.0)),
        "masked": weight.relu(),
    }


MANIFEST = {"name": "sample", "numbers": [1, 2.5, None, True], "text": "größe"}


def sealed(head: Any, payload: bytes = b"", deflate: bool = False, **fields: Any) -> bytes:
    """A file with a head of any content whose checksums and lengths are right."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    stored = zlib.compress(text) if deflate else text
    length = container.HEADER.size + len(stored) + len(payload) + 32
    values = {
        "version": container.VERSION,
        "flags": int(deflate),
        "length": length,
        "stored": len(stored),
        "decoded": len(text),
    }
    values.update(fields)
    header = container.HEADER.pack(container.MAGIC, *values.values(), zlib.crc32(stored))
    body = header + stored + payload
    return body + hashlib.sha256(body).digest()


def reseal(data: bytes) -> bytes:
    """The same with its outer checksums made right, as an attacker would."""
    if len(data) < container.HEADER.size + 32:
        return data
    (stored,) = struct.unpack_from("<I", data, 16)
    body = bytearray(data[:-32])
    head = bytes(body[container.HEADER.size : container.HEADER.size + stored])
    struct.pack_into("<I", body, 24, zlib.crc32(head))
    struct.pack_into("<Q", body, 8, len(data))
    return bytes(body) + hashlib.sha256(body).digest()


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(KINDS), st.lists(st.integers(0, 5), max_size=4), st.randoms(use_true_random=False), st.booleans()
)
def test_any_tensor_comes_back_bit_for_bit(kind: str, shape: list[int], chance: random.Random, few: bool) -> None:
    dtype = container.DTYPES[kind]
    size = math.prod(shape) * dtype.itemsize
    data = bytes(chance.choice((0, 1)) if few or dtype is torch.bool else chance.randrange(256) for _ in range(size))
    tensor = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    tensors = {"a": tensor.reshape(shape)}
    packed = container.pack({}, tensors)
    path = Path(os.environ["TERSE_TEST_FOLDER"]) / "any.terse"
    path.write_bytes(packed)
    assert same(container.read(path)[1], tensors)
    assert packed == container.pack({}, tensors)


@pytest.fixture(autouse=True, scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Hypothesis wants no function-scoped fixtures."""
    os.environ["TERSE_TEST_FOLDER"] = str(tmp_path_factory.mktemp("any"))
    yield
    del os.environ["TERSE_TEST_FOLDER"]


@pytest.mark.parametrize("kind", sorted(coding.FLOATS))
def test_every_kind_of_float_survives(kind: str, tmp_path: Path) -> None:
    dtype = container.DTYPES[kind]
    size = dtype.itemsize
    patterns = [0, 1 << (8 * size - 1), (1 << (8 * size)) - 1, (1 << (8 * size - 1)) - 1, 1, (1 << (8 * size)) - 2]
    data = (
        b"".join(p.to_bytes(size, "little") for p in patterns) * 40
    )  # 0, -0.0, NaNs of both signs, the smallest, a payload
    tensors = {"x": torch.frombuffer(bytearray(data), dtype=dtype)}
    container.write(tmp_path / "x.terse", {}, tensors)
    found = container.read(tmp_path / "x.terse")[1]
    assert bits(found["x"]) == data


def test_manifest_order_and_inspection(tmp_path: Path) -> None:
    path = tmp_path / "s.terse"
    container.write(path, MANIFEST, sample())
    manifest, tensors = container.read(path)
    assert manifest == MANIFEST
    assert same(tensors, sample())
    contents = container.inspect(path)
    rows = {row["name"]: row for row in contents.rows()}
    assert list(rows) == list(sample())
    assert contents.file_bytes == path.stat().st_size
    stored = sum(row["bytes"] for row in rows.values())
    assert contents.file_bytes == container.HEADER.size + contents.head_bytes + stored + 32
    assert rows["weight"]["codec"] == "floats"
    assert rows["int8"]["codec"] == "integers"
    assert rows["grid"]["codec"] == "grid"
    assert rows["book"]["codec"] == "codebook"
    assert rows["masked"]["codec"] == "sparse"
    assert rows["count"]["codec"] == "numbers"


def test_duplicates_are_stored_once_and_come_back_apart(tmp_path: Path) -> None:
    path = tmp_path / "s.terse"
    container.write(path, {}, sample())
    rows = {row["name"]: row for row in container.inspect(path).rows()}
    assert rows["weight"]["bytes"] > 0
    assert rows["again"]["bytes"] == 0
    tensors = container.read(path)[1]
    tensors["again"].zero_()
    assert bits(tensors["weight"]) == bits(sample()["weight"])


def test_strided_tensors_are_stored_as_they_read(tmp_path: Path) -> None:
    tensors = {
        "t": torch.arange(12.0).reshape(3, 4).t(),
        "e": torch.ones(1, 3).expand(2, 3),
        "b": torch.ones(2, 2)[:, 1],
    }
    container.write(tmp_path / "t.terse", {}, tensors)
    assert same(container.read(tmp_path / "t.terse")[1], tensors)


def test_weights_get_smaller(tmp_path: Path) -> None:
    weight = torch.randn(200, 200, generator=torch.Generator().manual_seed(0)) * 0.05
    packed = container.pack({}, {"w": weight})
    assert len(packed) < 0.85 * weight.nbytes
    assert len(container.pack({}, {"w": weight.bfloat16()})) < 0.70 * weight.bfloat16().nbytes
    assert len(container.pack({}, {"w": (weight * 400).to(torch.int8)})) < 0.82 * weight.numel()


@pytest.mark.parametrize(
    ("manifest", "tensors"),
    [
        ({"x": float("nan")}, {}),
        ({"x": object()}, {}),
        ({}, {"x": torch.zeros(2, dtype=torch.complex64)}),
        ({}, {"x": torch.zeros(2, 2).to_sparse()}),
        ({}, {"x": torch.zeros(2, device="meta")}),
        ({}, {"": torch.zeros(2)}),
    ],
)
def test_what_cannot_be_written_is_said_and_leaves_nothing(manifest: Any, tensors: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError):
        container.write(tmp_path / "x.terse", manifest, tensors)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.terse"
    container.write(path, {}, {"x": torch.zeros(3)})
    old = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TersenetError):
        container.write(path, {}, sample())
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["x.terse"]


def test_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    data = container.pack(MANIFEST, sample())
    path = tmp_path / "t.terse"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(FileError, match=r"t\.terse cannot be used: at byte \d+"):
            container.read(path)
        if length % 7 == 0:  # the same with checksums that fit
            path.write_bytes(reseal(data[:length]))
            with pytest.raises(FileError):
                container.read(path)


@pytest.mark.parametrize("attack", [False, True], ids=["chance", "resealed"])
def test_mutated_files_are_refused_or_unchanged(attack: bool, tmp_path: Path) -> None:
    """1,500 mutations each. With checksums made to fit, only a change of names or manifest may get through."""
    good = container.pack(MANIFEST, sample())
    known = {bits(tensor) for tensor in sample().values()}
    chance = random.Random(0)
    path = tmp_path / "m.terse"
    tracemalloc.start()
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(len(data)) if chance.random() < 0.7 else chance.randrange(40)
            data[at] = chance.choice((0, 1, 255, data[at] ^ (1 << chance.randrange(8)), chance.randrange(256)))
        path.write_bytes(reseal(bytes(data)) if attack else data)
        try:
            found = container.read(path)[1]
        except FileError:
            continue
        if attack:
            assert all(bits(tensor) in known for tensor in found.values())
        else:
            assert same(found, sample())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def blob(**changes: Any) -> list[Any]:
    values = {
        "dtype": "float32",
        "shape": [2],
        "codec": "raw",
        "length": 8,
        "crc": zlib.crc32(bytes(8)),
    }
    values.update(changes)
    return list(values.values())


def head(entry: Any, names: Any = None) -> dict[str, Any]:
    return {"manifest": {}, "names": [["x", 0]] if names is None else names, "blobs": [entry]}


def test_the_hostile_heads_below_start_from_a_good_one(tmp_path: Path) -> None:
    path = tmp_path / "good.terse"
    path.write_bytes(sealed(head(blob()), bytes(8)))
    assert torch.equal(container.read(path)[1]["x"], torch.zeros(2))


HOSTILE = {
    "a trillion elements": sealed(head(blob(shape=[10**12])), bytes(8)),
    "a product beyond 64 bits": sealed(head(blob(shape=[2**40, 2**40, 2**40])), bytes(8)),
    "huge beside zero": sealed(head(blob(shape=[0, 2**40, 2**40])), bytes(8)),
    "a trillion constants": sealed(head(blob(dtype="int8", shape=[10**12], codec="integers", length=2)), b"\1\0"),
    "a trillion numbers of one": sealed(head(blob(dtype="int8", shape=[10**12], codec="numbers", length=3)), b"\1\0\0"),
    "a codec of floats only": sealed(head(blob(dtype="int32", codec="grid")), bytes(8)),
    "negative size": sealed(head(blob(shape=[-2])), bytes(8)),
    "size of truth": sealed(head(blob(shape=[True, 2])), bytes(8)),
    "size of a float": sealed(head(blob(shape=[2.0])), bytes(8)),
    "rank 40": sealed(head(blob(shape=[1] * 40)), bytes(8)),
    "shape is text": sealed(head(blob(shape="22")), bytes(8)),
    "unknown dtype": sealed(head(blob(dtype="object")), bytes(8)),
    "dtype is a list": sealed(head(blob(dtype=[])), bytes(8)),
    "codec is a list": sealed(head(blob(codec=[])), bytes(8)),
    "unknown codec": sealed(head(blob(codec="pickle")), bytes(8)),
    "codec of another kind": sealed(head(blob(codec="integers")), bytes(8)),
    "payload beyond the end": sealed(head(blob(length=80)), bytes(8)),
    "payload left over": sealed(head(blob()), bytes(9)),
    "length is text": sealed(head(blob(length="8")), bytes(8)),
    "raw of another length": sealed(head(blob(shape=[3])), bytes(8)),
    "name twice": sealed(head(blob(), [["x", 0], ["x", 0]]), bytes(8)),
    "name of number": sealed(head(blob(), [[3, 0]]), bytes(8)),
    "no such blob": sealed(head(blob(), [["x", 1]]), bytes(8)),
    "negative blob": sealed(head(blob(), [["x", -1]]), bytes(8)),
    "blob without a name": sealed(head(blob(), []), bytes(8)),
    "blob of four": sealed(head(blob()[:4]), bytes(8)),
    "boolean of two": sealed(head(blob(dtype="bool", length=2, crc=zlib.crc32(b"\2\0"))), b"\2\0"),
    "head is a list": sealed([]),
    "head is no JSON": sealed(b"{"),
    "head is no text": sealed(b"\xff\xfe"),
    "head has NaN": sealed(b'{"manifest": {"x": NaN}, "names": [], "blobs": []}'),
    "nested 100,000 deep": sealed(b"[" * 100_000, deflate=True),
    "a number of 100,000 digits": sealed(b'{"manifest": {"x": ' + b"9" * 100_000 + b'}, "names": [], "blobs": []}'),
    "head that inflates a thousandfold": sealed(b" " * (40 << 20), deflate=True),
    "head that inflates to more than it says": sealed(b" " * 5000, deflate=True, decoded=100),
    "head that is no deflate": sealed(b"{}", flags=1),
    "unknown flag": sealed({"manifest": {}, "names": [], "blobs": []}, flags=2),
    "next version": sealed({"manifest": {}, "names": [], "blobs": []}, version=4),
    "first version": sealed({"manifest": {}, "names": [], "blobs": []}, version=1),
    "head longer than the file": sealed(b"{}", stored=2**32 - 1),
    "pickle": pickle.dumps({"x": 1}),
    "nothing": b"",
    "magic alone": b"TERSE",
    "zip": b"PK\3\4" + bytes(100),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused_at_once(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "h.terse"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(FileError, match=r"h\.terse cannot be used: at byte \d+"):
        container.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (4 << 20) + 64 * len(data)


def test_the_caller_sets_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "z.terse"
    container.write(path, {}, {"z": torch.zeros(10 << 20)})  # 40 MiB in a few hundred bytes
    assert path.stat().st_size < 1000
    with pytest.raises(FileError, match="max_bytes"):
        container.read(path)
    assert container.read(path, max_bytes=40 << 20)[1]["z"].shape == (10 << 20,)
    with pytest.raises(FileError, match="max_bytes"):
        container.read(path, max_bytes=(40 << 20) - 1)


def test_a_missing_file_and_a_folder_are_said(tmp_path: Path) -> None:
    for path in (tmp_path / "none.terse", tmp_path):
        with pytest.raises(FileError, match="cannot be read"):
            container.read(path)
