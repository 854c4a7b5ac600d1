"""The latency table on disk: there and back, damaged, and of another device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tersenet.cache import cache_folder
from tersenet.errors import FileError
from tersenet.search.table import Table

HERE: dict[str, Any] = {
    "cpu": "a", "cores": 2, "runtime": "onnxruntime", "version": "1.2.3", "threads": 1, "batch": 4,
}  # fmt: skip
NETWORK = {"ms": 1.5, "float_ms": 3.0, "checks": [1.0, 1.25]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TERSENET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def filled() -> Table:
    table = Table.open(HERE)
    table.changes["kind=8"] = -0.125
    table.networks["net"] = dict(NETWORK)
    table.write()
    return table


def test_there_and_back(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = filled()
    assert made.path == cache / "tables" / "onnxruntime-1.2.3-1-4.json"
    assert [path.name for path in made.path.parent.iterdir()] == [made.path.name]  # no temporary file stays
    found = Table.open(HERE)
    assert found == made
    assert found.changes == {"kind=8": -0.125}
    assert Table.read(made.path) == made
    assert capsys.readouterr() == ("", "")


def test_the_first_time_is_silent(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Table.open(HERE).changes == {}
    assert not cache.exists()  # looking writes nothing
    assert capsys.readouterr() == ("", "")


GOOD = {"schema": 1, "device": HERE, "changes": {"kind=8": -0.1}, "networks": {"net": NETWORK}}
DAMAGED = {
    "cut short": json.dumps(GOOD)[:-20].encode(),
    "no text": b"\xff\xfe\x00\x01",
    "empty": b"",
    "a list": b"[]",
    "nested far too deep": b"[" * 200_000,
    "another schema": json.dumps({**GOOD, "schema": 2}).encode(),
    "no device": json.dumps({key: value for key, value in GOOD.items() if key != "device"}).encode(),
    "changes that are no numbers": json.dumps({**GOOD, "changes": {"kind=8": "fast"}}).encode(),
    "changes that are not finite": json.dumps({**GOOD, "changes": {"kind=8": float("nan")}}).encode(),
    "a network without times": json.dumps({**GOOD, "networks": {"net": {}}}).encode(),
    "a network that takes no time": json.dumps({**GOOD, "networks": {"net": {**NETWORK, "ms": 0}}}).encode(),
    "a network with words for times": json.dumps({**GOOD, "networks": {"net": {**NETWORK, "float_ms": "3"}}}).encode(),
    "a network without checks": json.dumps({**GOOD, "networks": {"net": {"ms": 1.0, "float_ms": 2.0}}}).encode(),
    "checks that are no times": json.dumps({**GOOD, "networks": {"net": {**NETWORK, "checks": [None]}}}).encode(),
    "a network that is a list": json.dumps({**GOOD, "networks": {"net": []}}).encode(),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_table_is_filled_anew_and_said(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = filled().path
    assert path is not None
    path.write_bytes(DAMAGED[kind])
    with pytest.raises(FileError, match="is damaged"):
        Table.read(path)
    found = Table.open(HERE)
    assert (found.changes, found.networks, found.path) == ({}, {}, path)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"tersenet: the latency table {path} is damaged (")
    assert err.endswith("; the table is filled anew\n")
    assert err.count("\n") == 1
    found.changes["kind=4"] = 1.0
    found.write()
    assert Table.open(HERE).changes == {"kind=4": 1.0}


def test_a_good_table_is_not_damaged(capsys: pytest.CaptureFixture[str]) -> None:
    """The text that the damaged ones were made from."""
    path = filled().path
    assert path is not None
    path.write_text(json.dumps(GOOD), encoding="utf-8")
    assert Table.open(HERE).networks == {"net": NETWORK}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("key", "value"), [("cpu", "b"), ("cores", 8), ("version", "9.9")])
def test_the_table_of_another_device_is_left_aside_and_said(
    key: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = filled().path
    assert path is not None
    data = json.loads(path.read_text(encoding="utf-8"))
    data["device"][key] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    found = Table.open(HERE)
    assert (found.changes, found.networks, found.device) == ({}, {}, HERE)
    out, err = capsys.readouterr()
    assert out == ""
    assert f"({key} {value!r}, here {HERE[key]!r})" in err
    assert err.count("\n") == 1


def test_other_runtimes_versions_threads_and_batches_have_files_of_their_own() -> None:
    filled()
    for key, value in (("runtime", "openvino"), ("version", "9.9"), ("threads", 2), ("batch", 1)):
        assert Table.open({**HERE, key: value}).changes == {}
    assert Table.open(HERE).changes == {"kind=8": -0.125}


def test_a_frozen_table_is_not_written(tmp_path: Path) -> None:
    table = filled()
    table.frozen = True
    table.changes["kind=4"] = 1.0
    table.write()
    assert Table.open(HERE).changes == {"kind=8": -0.125}
    table.write(tmp_path / "elsewhere" / "device.json")  # asked for by name
    assert Table.read(tmp_path / "elsewhere" / "device.json").changes == table.changes
    Table(HERE).write()  # in memory


def test_a_missing_table(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none\.json cannot be read: No such file"):
        Table.read(tmp_path / "none.json")
    with pytest.raises(FileError, match="cannot be read"):
        Table.read(tmp_path)


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("TERSENET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "tersenet"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_folder() == tmp_path / "home" / ".cache" / "tersenet"
