"""What opening one file costs: time to load, time of the first call, memory; to be had in a fresh process only.

A process that has other models open has their memory too, and has already warmed up what is shared, so the figures of
one file can only be had alone, as `tersenet.deploy.worker` runs it.

Memory is how much the peak of resident memory lies above what was resident once the runtime's package was imported,
without the input: the file's weights, what the runtime builds from them, and its working memory. The package
itself (tens of megabytes; PyTorch over two hundred) is not counted, as it does not depend on the file.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tersenet.deploy.quiet import quiet_native
from tersenet.deploy.runtimes import RUNTIMES, Runner, open_file
from tersenet.errors import require

_CALLS = 3  # the first call allocates; some runtimes allocate once more on the second
# What a runtime and our own readers import later is likewise not the file's cost.
_READERS = {
    ".terse": ("tersenet.deploy.artifact",),
    ".pt2": ("tersenet.deploy.pt2",),
    ".tflite": ("tersenet.deploy.litert", "ai_edge_litert.interpreter"),
    ".pte": ("tersenet.deploy.executorch", "executorch.runtime"),
}


@dataclass(frozen=True)
class Footprint:
    """Milliseconds to open the file and of the first call, and bytes of memory at the peak (None: cannot be told)."""

    load_ms: float
    first_ms: float
    peak_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Opening:
    """A file just opened, in a process that has opened no other.

    Args:
        runner: the file.
        load_ms: how long opening took, its runtime being imported already.
        resident: bytes of memory before it; None where that cannot be told.
    """

    runner: Runner
    load_ms: float
    resident: int | None

    @classmethod
    def of(cls, path: str | Path, runtime: str, threads: int) -> Opening:
        """Raises as `open_file`."""
        entry = RUNTIMES[runtime]
        if entry.extra is not None:
            require(entry.package, entry.extra, f"run {Path(path).name}")
        with quiet_native():
            for module in (entry.package, *_READERS.get(Path(path).suffix.lower(), ())):
                importlib.import_module(module)
        _reset_peak()
        resident = _memory("VmRSS")
        start = time.perf_counter()
        runner = open_file(path, runtime, threads)
        return cls(runner, (time.perf_counter() - start) * 1e3, resident)

    def first_calls(self, x: Sequence[np.ndarray]) -> Footprint:
        """Makes the first calls; refuses inputs (N, ...) that do not fit, as `Runner.run`."""
        start = time.perf_counter()
        self.runner.run(x)
        first_ms = (time.perf_counter() - start) * 1e3
        for _ in range(_CALLS - 1):
            self.runner.run(x)
        peak = _memory("VmHWM")
        grown = (
            None
            if self.resident is None or peak is None
            else max(0, peak - self.resident - sum(each.nbytes for each in x))
        )
        return Footprint(self.load_ms, first_ms, grown)


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
