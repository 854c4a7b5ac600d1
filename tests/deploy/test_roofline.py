"""The roof is monotone, and the cache of it survives damage and strangers."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersenet.deploy import roofline as room
from tersenet.deploy.roofline import Roofline, measured, roofline

FOUND = Roofline(1, {"float32": {"pytorch": 2e11}, "int8": {"onnxruntime": 8e11}}, 4e10, 1e11, 2**25, 16)
INTENSITIES = st.floats(1e-3, 1e6)


@given(INTENSITIES, INTENSITIES, st.sampled_from(["float32", "int8"]))
def test_the_roof_never_falls_and_ends_at_the_peak(low: float, high: float, precision: str) -> None:
    low, high = sorted((low, high))
    assert FOUND.attainable(low, precision) <= FOUND.attainable(high, precision) <= FOUND.peak(precision)
    assert FOUND.attainable(low, precision, resident=0) >= FOUND.attainable(low, precision)  # the cache is no slower
    assert FOUND.attainable(low, "float32") <= FOUND.attainable(low, "int8")


@given(st.floats(1, 1e12), st.floats(1, 1e9), st.floats(1, 4))
def test_more_work_never_takes_less(flops: float, moved: float, more: float) -> None:
    compute, memory = FOUND.least_seconds(flops, "float32", moved, math.inf)
    assert FOUND.least_seconds(more * flops, "float32", moved, math.inf)[0] >= compute
    assert FOUND.least_seconds(flops, "float32", more * moved, math.inf)[1] >= memory
    # The time and the roof say the same.
    assert flops / max(compute, memory) == pytest.approx(FOUND.attainable(flops / moved))


def test_a_precision_that_nothing_measures_has_the_peak_of_float32() -> None:
    assert Roofline(1, {"float32": {"a": 1.0}, "int8": {}}, 1, 1, 1, 8).peak("int8") == 1


def test_measured_here() -> None:
    found = measured(1, seconds=0.0)
    assert found.threads == 1
    assert found.flops["float32"]["pytorch"] > 1e8
    assert all(value > 0 for by in found.flops.values() for value in by.values())
    assert found.memory > 1e8
    assert found.lanes in (4, 8, 16)
    assert found.cache_bytes >= 2**15


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and figures that count how often they were measured."""
    monkeypatch.setenv("TERSENET_CACHE", str(tmp_path))
    counted = itertools.count(1)
    figures = {"flops": {"float32": {"pytorch": 2e11}, "int8": {}}, "cache": 1e11, "cache_bytes": 2**25, "lanes": 16}
    monkeypatch.setattr(room, "measured", lambda threads: Roofline(threads, memory=float(next(counted)), **figures))
    return tmp_path


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "roofline").iterdir())


def test_it_is_measured_once_for_each_number_of_threads(cache: Path) -> None:
    said: list[str] = []
    first = roofline(1, say=said.append)
    assert len(said) == 1
    assert "1 thread (seconds)" in said[0]
    assert roofline(1, say=said.append) == first
    assert len(said) == 1
    assert roofline(2).memory == 2
    assert len(kept(cache)) == 2
    assert roofline(1, again=True).memory == 3
    assert roofline(1).memory == 3
    text = "".join(path.read_text() for path in kept(cache))
    assert str(Path.home()) not in text


def _other_version(text: str) -> str:
    value: dict[str, Any] = json.loads(text)
    value["key"]["versions"]["onnxruntime"] = "0.1"
    return json.dumps(value)


def _other_machine(text: str) -> str:
    value: dict[str, Any] = json.loads(text)
    value["key"]["machine"]["cpu"] = "another"
    return json.dumps(value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: "", "damaged"),
        (lambda text: "[]", "damaged"),
        (lambda text: "{" * 10_000, "damaged"),
        (lambda text: text.replace("1.0", "NaN"), "damaged"),
        (lambda text: text.replace("1.0", "-1.0"), "damaged"),
        (lambda text: text.replace('"memory"', '"memories"'), "damaged"),
        (lambda text: text.replace("200000000000.0", '"fast"'), "damaged"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "another machine or version"),
        (_other_version, "another machine or version"),
        (_other_machine, "another machine or version"),
    ],
)
def test_a_damaged_or_foreign_cache_is_ignored_and_said(cache: Path, change: Any, word: str) -> None:
    roofline(1)
    (path,) = kept(cache)
    changed = change(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    said: list[str] = []
    assert roofline(1, say=said.append).memory == 2
    assert len(said) == 2
    assert word in said[0]
    assert "measured again" in said[0]
    assert roofline(1, say=said.append).memory == 2  # and mended
    assert len(said) == 2


def test_bytes_that_are_no_text(cache: Path) -> None:
    roofline(1)
    kept(cache)[0].write_bytes(b"\xff\xfe\x00")
    said: list[str] = []
    assert roofline(1, say=said.append).memory == 2
    assert "cannot be read" in said[0]


def test_a_cache_that_cannot_be_written_does_not_stop(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TERSENET_CACHE", str(tmp_path / "file"))
    said: list[str] = []
    assert roofline(1, say=said.append).memory == 1
    assert "was not kept" in said[-1]
