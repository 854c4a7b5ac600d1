"""What opening one file costs: time to load, time of the first call, memory; in a fresh process of its own.

A process that has other models open has their memory too, and has already warmed up what is shared, so the figures of
one file can only be had alone: `python -m tersenet.deploy.footprint FILE RUNTIME THREADS SHAPE` prints them as JSON.

Memory is how much the peak of resident memory lies above what was resident once the runtime's package was imported
and the input was there: the file's weights, what the runtime builds from them, and its working memory. The package
itself (tens of megabytes; PyTorch over two hundred) is not counted, as it does not depend on the file.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tersenet.deploy.runtimes import RUNTIMES, open_file
from tersenet.errors import FileError

_CALLS = 3  # the first call allocates; some runtimes allocate once more on the second


@dataclass(frozen=True)
class Footprint:
    """Milliseconds to open the file and of the first call, and bytes of memory at the peak (None: cannot be told)."""

    load_ms: float
    first_ms: float
    peak_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def footprint(path: str | Path, runtime: str, shape: tuple[int, ...], threads: int = 1) -> Footprint:
    """Opens the file and calls it, in a fresh process. Cost: one or two seconds, most of it for starting Python.

    Args:
        shape: of the input, (N, ...); the memory depends on it.
    Raises:
        FileError: when the process fails; says what it said last.
    """
    command = [sys.executable, "-m", "tersenet.deploy.footprint", str(path), runtime, str(threads), json.dumps(shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise FileError(f"{path} could not be run in a process of its own: {said[-1]}")
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def _here(path: str, runtime: str, threads: int, shape: tuple[int, ...]) -> Footprint:
    importlib.import_module(RUNTIMES[runtime].package)
    if Path(path).suffix == ".terse":
        importlib.import_module("tersenet.deploy.artifact")  # likewise not the file's own cost
    elif Path(path).suffix == ".pt2":
        importlib.import_module("tersenet.deploy.pt2")
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    _reset_peak()
    before = _memory("VmRSS")
    start = time.perf_counter()
    runner = open_file(path, runtime, threads)
    loaded = time.perf_counter()
    runner.run(x)
    called = time.perf_counter()
    for _ in range(_CALLS - 1):
        runner.run(x)
    after = _memory("VmHWM")
    grown = None if before is None or after is None else max(0, after - before)
    return Footprint((loaded - start) * 1e3, (called - loaded) * 1e3, grown)


def _reset_peak() -> None:
    """Linux: makes the peak start again from what is resident now; importing peaks above what stays."""
    with contextlib.suppress(OSError):  # elsewhere the peak so far stands, and growth below it goes unseen
        Path("/proc/self/clear_refs").write_text("5")


def _memory(field: str) -> int | None:
    """A line of /proc/self/status in bytes; elsewhere the peak so far stands for both lines."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    _, _path, _runtime, _threads, _shape = sys.argv
    print(json.dumps(_here(_path, _runtime, int(_threads), tuple(json.loads(_shape))).to_json()))
