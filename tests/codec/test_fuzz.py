"""A small part of benchmarks/fuzz_terse.py: 2,000 damaged and hostile files do no harm."""

from __future__ import annotations

import random
import runpy
import tracemalloc
from pathlib import Path

import pytest

FUZZ = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "fuzz_terse.py"))


@pytest.mark.minutes
def test_two_thousand_files_load_unchanged_or_are_refused(tmp_path: Path) -> None:
    found = FUZZ["work"](2000, 7, tmp_path / "progress")
    tracemalloc.stop()
    assert found["failures"] == []
    assert found["counts"]["refused"] > 1500
    assert len(found["mutations"]) > 8


def test_what_is_resealed_reaches_the_decoders(tmp_path: Path) -> None:
    """A changed payload must be caught by what decodes it, not by the checksum of the whole."""
    files = FUZZ["corpus"](tmp_path)
    data = bytearray(files["predicted"])
    data[-60] ^= 4
    path = tmp_path / "x.terse"
    tracemalloc.start()
    try:
        what = FUZZ["tried"](path, FUZZ["resealed"](bytes(data)), False, set())[0]
        assert what == "refused"
        assert FUZZ["tried"](path, files["predicted"], False, set())[0] == "other weights"  # it does tell
    finally:
        tracemalloc.stop()


def test_mutations_follow_their_seed(tmp_path: Path) -> None:
    files = FUZZ["corpus"](tmp_path)
    drawn = [[FUZZ["mutated"](files, chance) for _ in range(20)] for chance in (random.Random(1), random.Random(1))]
    assert drawn[0] == drawn[1]
