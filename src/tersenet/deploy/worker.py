"""One contender in a process of its own: `python -m tersenet.deploy.worker CORES`, spoken to in lines of JSON.

The first thing it does is to keep to its cores, before any runtime is imported: a runtime that counts the cores when it
is loaded then finds those that it will run on. (OpenVINO 2026.4, pinned afterwards, moves its thread at each call
and was 2 to 7 times slower.) Then it waits for requests on standard input and answers each with one line on standard
output:

    {"do": "open", "path", "runtime", "threads"}   -> {"inputs": [[name, shape, dtype]], "load_ms"}
    {"do": "input", "file"}                        -> {"first_ms", "peak_bytes", "counted"}
    {"do": "warm"}                                 -> {"calls", "ms", "stable"}
    {"do": "turn", "discard", "calls"}             -> {"ns": [...], "joules"}

`file` is a .npy, (N, ...), or a .npz of all inputs by order. What goes wrong is answered as {"error": class, "said":
sentence}. It ends when its input ends, so it does not outlive the process that started it. While it waits it only
blocks on a read, and takes no time from the others.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tersenet.deploy.energy import Counters
    from tersenet.deploy.footprint import Opening


class Session:
    """What the requests of one contender act on."""

    def __init__(self) -> None:
        self.opening: Opening | None = None
        self.x: Any = ()
        self.counters: Counters | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        verbs: dict[str, Callable[..., dict[str, Any]]]
        verbs = {"open": self.open, "input": self.input, "warm": self.warm, "turn": self.turn}
        return verbs[request.pop("do")](**request)

    def open(self, path: str, runtime: str, threads: int) -> dict[str, Any]:
        from tersenet.deploy.energy import Counters
        from tersenet.deploy.footprint import Opening

        self.opening = Opening.of(path, runtime, threads)
        self.counters = Counters.find()
        inputs = [[each.name, each.shape, each.dtype] for each in self.opening.runner.expected]
        return {"inputs": inputs, "load_ms": self.opening.load_ms}

    def input(self, file: str) -> dict[str, Any]:
        import numpy as np

        assert self.opening is not None
        read = np.load(file, allow_pickle=False)
        self.x = (read,) if isinstance(read, np.ndarray) else tuple(read[f"arr_{i}"] for i in range(len(read.files)))
        found = self.opening.first_calls(self.x)
        gc.collect()
        gc.disable()
        return {"first_ms": found.first_ms, "peak_bytes": found.peak_bytes, "counted": self.counters is not None}

    def warm(self) -> dict[str, Any]:
        from tersenet.deploy.warm import warm_up

        assert self.opening is not None
        call, x = self.opening.runner.call, self.x
        return warm_up(lambda: call(*x))._asdict()

    def turn(self, discard: int, calls: int) -> dict[str, Any]:
        assert self.opening is not None
        call, x, clock = self.opening.runner.call, self.x, time.perf_counter_ns
        for _ in range(discard):
            call(*x)
        before = self.counters.read() if self.counters else ()
        times = []
        for _ in range(calls):
            start = clock()
            call(*x)
            times.append(clock() - start)
        joules = self.counters.joules(before, self.counters.read()) / calls if self.counters else None
        return {"ns": times, "joules": joules}


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answers line after line, until there are no more."""
    from tersenet.errors import TersenetError

    session = Session()
    for line in requests:
        try:
            said = session.answer(json.loads(line))
        except TersenetError as error:
            said = {"error": type(error).__name__, "said": str(error)}
        except Exception as error:  # noqa: BLE001 a runtime's own kinds, which only this process knows
            first = (str(error).strip().splitlines() or [""])[0]
            said = {"error": "FileError", "said": f"{type(error).__name__}: {first}"}
        print(json.dumps(said), file=answers, flush=True)


def main() -> None:
    cores = {int(core) for core in sys.argv[1].split(",") if core}
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    # Libraries that print must not print between the answers.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
