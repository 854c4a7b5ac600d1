"""The latency table of a device: what each kind of change saved when it was measured in place, kept on disk.

One file per machine, runtime, version, threads and batch, under the user's cache folder. An entry is the time that a
change adds to a network (negative: saves), in milliseconds: the difference of two whole networks that were timed in
turns, divided by the number of places that differ, so that fusion and layout are in it. What a site is, is known by its
layers' types, sizes and shapes, so that networks with the same layers share entries.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tersenet.atomic import writing
from tersenet.cache import cache_folder
from tersenet.errors import FileError

SCHEMA = 1


@dataclass
class Table:
    """What was measured on one device.

    Args:
        device: what must be the same: {"cpu", "cores", "runtime", "version", "threads", "batch"}.
        changes: key of a change -> milliseconds added at one place.
        networks: key of a network -> {"ms": unchanged, "float_ms": its float file, "checks": measured times of random
            candidates, "timed" and "confirmed": measured times of proposals, in one process and each in its own, by
            a hash of their picks}.
        path: where it is kept; None keeps it in memory.
        frozen: filled elsewhere, so that nothing can be measured into it here.
    """

    device: dict[str, Any]
    changes: dict[str, float] = field(default_factory=dict)
    networks: dict[str, dict[str, Any]] = field(default_factory=dict)
    path: Path | None = None
    frozen: bool = False

    @classmethod
    def open(cls, device: Mapping[str, Any], folder: Path | None = None) -> Table:
        """The table of this device from the cache; empty when there is none. A damaged or foreign file is left aside,
        and said so on standard error."""
        folder = cache_folder() / "tables" if folder is None else folder
        name = "-".join(str(device[key]) for key in ("runtime", "version", "threads", "batch"))
        path = folder / f"{name}.json"
        empty = cls(dict(device), path=path)
        if not path.exists():
            return empty
        try:
            found = cls.read(path)
        except FileError as error:
            print(f"tersenet: {error}; the table is filled anew", file=sys.stderr)
            return empty
        differs = [key for key, value in device.items() if found.device.get(key) != value]
        if differs:
            key = differs[0]
            print(
                f"tersenet: the latency table {path} is of another machine ({key} {found.device.get(key)!r}, here "
                f"{device[key]!r}) and is left aside; it is filled anew",
                file=sys.stderr,
            )
            return empty
        return found

    @classmethod
    def read(cls, path: str | Path) -> Table:
        """Reads a table. Raises FileError when it is missing or damaged."""
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise FileError(f"the latency table {path} cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise FileError(f"the latency table {path} is damaged (it is no JSON)") from error
        good = (
            isinstance(data, dict)
            and data.get("schema") == SCHEMA
            and all(isinstance(data.get(key), dict) for key in ("device", "changes", "networks"))
            and all(_is_time(value) for value in data["changes"].values())
            and all(_is_network(value) for value in data["networks"].values())
        )
        if not good:
            raise FileError(f"the latency table {path} is damaged (its contents are not those of schema {SCHEMA})")
        return cls(data["device"], data["changes"], data["networks"], path)

    def write(self, path: str | Path | None = None) -> None:
        """Puts it on disk in one move; a table in memory or of another device stays where it is."""
        target = self.path if path is None else Path(path)
        if target is None or (self.frozen and path is None):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        data = {"schema": SCHEMA, "device": self.device, "changes": self.changes, "networks": self.networks}
        with writing(target) as temporary:
            temporary.write_text(json.dumps(data, indent=1, sort_keys=True), encoding="utf-8")


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_network(value: Any) -> bool:
    """Whether everything is there that a search reads, in numbers that a search can divide by."""
    if not isinstance(value, dict) or not isinstance(value.get("checks"), list):
        return False
    kept = [value.get(name, {}) for name in ("timed", "confirmed")]
    if not all(isinstance(each, dict) for each in kept):
        return False
    times = [value.get("ms"), value.get("float_ms"), *value["checks"], *(v for each in kept for v in each.values())]
    return all(_is_time(time) and time > 0 for time in times)
