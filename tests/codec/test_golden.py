"""Files of versions 2 and 3 must read the same for ever, and today's writer must still write the latter.

The files in tests/golden were written once; their .json files hold the SHA-256 of each tensor.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import pytest
import torch

from tersenet.codec import container

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["sample", "version-2", "before-books"])
def test_the_golden_file_reads_as_it_did(name: str) -> None:
    expected = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    manifest, tensors = container.read(GOLDEN / f"{name}.terse")
    assert manifest == expected["manifest"]
    found = {
        name: [
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape),
            hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            if tensor.numel()
            else hashlib.sha256(b"").hexdigest(),
        ]
        for name, tensor in tensors.items()
    }
    assert found == expected["tensors"]
    assert list(found) == list(expected["tensors"])


def test_todays_writer_writes_the_golden_payloads() -> None:
    """The head is compared as text: another build of zlib may deflate it otherwise."""
    golden = (GOLDEN / "sample.terse").read_bytes()
    written = container.pack(*container.read(GOLDEN / "sample.terse"))

    def parts(data: bytes) -> tuple[bytes, bytes]:
        stored = int.from_bytes(data[16:20], "little")
        start = container.HEADER.size + stored
        return zlib.decompress(data[container.HEADER.size : start]), data[start:-32]

    assert parts(written) == parts(golden)


@pytest.mark.skipif("ng" in zlib.ZLIB_RUNTIME_VERSION, reason="zlib-ng deflates to other bytes than zlib")
def test_todays_writer_writes_the_golden_file() -> None:
    golden = (GOLDEN / "sample.terse").read_bytes()
    assert container.pack(*container.read(GOLDEN / "sample.terse")) == golden
