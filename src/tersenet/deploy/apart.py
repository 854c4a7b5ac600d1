"""Contenders that are each measured in a process of their own, in turns; the other end of `tersenet.deploy.worker`.

In one process contenders share an allocator, thread pools and caches of code, and one of them can leave a setting
behind that slows another. Apart, each is what it would be in somebody's program, and its memory and first call can be
told.
Only one process works at a time: the others wait for their turn in a read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from tersenet import errors
from tersenet.deploy.energy import Energy
from tersenet.deploy.estimate import estimate_file
from tersenet.deploy.footprint import Footprint
from tersenet.deploy.machine import machine, usable_cores
from tersenet.deploy.made_inputs import made_inputs
from tersenet.deploy.runner import Input, as_taken
from tersenet.deploy.timings import Measurement, joined
from tersenet.deploy.turns import LEAST_TURNS, Key, check_schedule, play
from tersenet.deploy.warm import Warmed
from tersenet.errors import FileError, SettingsError
from tersenet.numerics.intervals import bootstrap_median


class Entry(NamedTuple):
    """A file that takes part: a name of its own, where it is, in which runtime, and on which inputs (N, ...), where
    these are not those of all; of a file with several inputs a tuple. `size` is the (height, width) of images where the
    file leaves them open."""

    name: str
    path: Path
    runtime: str
    x: np.ndarray | tuple[np.ndarray, ...] | None = None
    size: tuple[int, int] | None = None

    @property
    def key(self) -> Key:
        return self.name, self.runtime


class Worker:
    """A process that holds one file open. Inside `with`; afterwards the process is gone, whatever happened."""

    def __init__(self, entry: Entry, cores: Sequence[int]) -> None:
        self.entry = entry
        self._command = [sys.executable, "-m", "tersenet.deploy.worker", ",".join(map(str, cores))]

    def __enter__(self) -> Worker:
        self._said: IO[bytes] = tempfile.TemporaryFile()  # closed in __exit__
        # A session of its own: Ctrl-C reaches only us, and we end it with all that it may have started.
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
            encoding="utf-8", start_new_session=True,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self._said):
            with contextlib.suppress(OSError):  # what was still to be written has no reader
                if pipe is not None:
                    pipe.close()

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """One request, one answer.

        Raises:
            TersenetError: of the class and with the sentence that the process answered.
            FileError: when the process has died; says how, and what it said last.
        """
        line = ""
        self._doing = "opened" if do == "open" else "measured"
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"do": do, **more}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline() if self.process.stdout else ""
        if not line.endswith("\n"):
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["error"])(answer["said"])
        return answer

    def _died(self) -> FileError:
        code = self.process.wait()
        how = f"ended with code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        self._said.seek(0)
        lines = [line for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
        last = f" (it said last: {lines[-1].strip()[:200]})" if lines else ""
        hint = "; was there enough memory?" if -code == signal.SIGABRT or code == -9 else ""
        return FileError(
            f"the process that ran {self.entry.path} in {self.entry.runtime} {how} while it was "
            f"{self._doing}{last}{hint}"
        )


def cores_for(threads: int) -> tuple[int, ...]:
    """The cores that measuring with so many threads keeps to; empty where the system cannot be told to.

    The last ones that are allowed: the first ones serve most interrupts.

    Raises:
        SettingsError: on more threads than there are cores.
    """
    cores = usable_cores()
    if threads > cores:
        raise SettingsError(
            f"{threads} threads were asked for, but this process may use {cores} "
            f"{'core' if cores == 1 else 'cores'}; give at most as many threads as cores"
        )
    return tuple(sorted(os.sched_getaffinity(0))[-threads:]) if hasattr(os, "sched_getaffinity") else ()


def measure_apart(
    entries: Sequence[Entry],
    *,
    x: np.ndarray | tuple[np.ndarray, ...] | None = None,
    batch: int = 1,
    threads: int = 1,
    turns: int = LEAST_TURNS,
    calls: int = 50,
    discard: int = 10,
    seed: int = 0,
    cold: bool = False,
    budget_s: float | None = None,
    progress: bool = False,
    energy: bool = True,
    openings: int = 1,
) -> Measurement:
    """Times files in turns, each in its own process on the last `threads` cores.

    Args:
        openings: the turns are shared out over so many openings of all the files, in new processes and another order
            each time, so that where memory comes to lie is in the intervals too; 1 to half the turns. What opening
            and warming up cost, and the energy, are those of the first.
        x: real inputs (N, ...), of which the first `batch` are used, of several inputs a tuple; None draws normal noise
            of the files' own shapes, which serves only floats.
        energy: where the counters cannot be read, estimate the energy of each file's call.
        turns, calls, discard, seed, cold, budget_s, progress: as in `tersenet.deploy.measure.measure`.
    Raises:
        SettingsError: on more threads than cores, and as `measure`.
        DataError, FileError, MissingExtra: as `open_file` and `Runner.run`; FileError also when a process dies.
    """
    check_schedule(turns, calls, discard, threads)
    _check_names(entries)
    if not 1 <= openings <= turns // 2:
        raise SettingsError(f"openings must lie in 1..{turns // 2} (half the turns), got {openings}")
    cores, found = cores_for(threads), []
    for opening in range(openings):
        schedule = {"turns": math.ceil(turns / openings), "calls": calls, "discard": discard, "seed": seed + opening,
                    "cold": cold, "budget_s": None if budget_s is None else budget_s / openings,
                    "progress": progress}  # fmt: skip
        order = random.Random(seed + opening).sample(entries, len(entries)) if opening else entries
        found.append(_one_opening(order, cores, x, batch, threads, energy, schedule))
    return joined(found)


def _one_opening(
    entries: Sequence[Entry],
    cores: tuple[int, ...],
    x: np.ndarray | tuple[np.ndarray, ...] | None,
    batch: int,
    threads: int,
    energy: bool,
    schedule: dict[str, Any],
) -> Measurement:
    """Opens all files in processes of their own and lets them take turns as `tersenet.deploy.turns.play` has it."""
    samples: dict[Key, list[float]] = {entry.key: [] for entry in entries}
    joules: dict[Key, list[float]] = {entry.key: [] for entry in entries}
    footprints, energies, warmed = {}, {}, {}
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = {}
        for entry in entries:
            worker = workers[entry.key] = stack.enter_context(Worker(entry, cores))
            opened = worker.ask("open", path=str(entry.path), runtime=entry.runtime, threads=threads)
            expected = [Input(own, tuple(shape), dtype) for own, shape, dtype in opened["inputs"]]
            inputs = inputs_for(entry.name, expected, x if entry.x is None else entry.x, batch, entry.size)
            np.savez(scratch / "input.npz", *inputs)
            first = worker.ask("input", file=str(scratch / "input.npz"))
            footprints[entry.key] = Footprint(opened["load_ms"], first["first_ms"], first["peak_bytes"])
            if energy and not first["counted"] and (found := estimate_file(entry.path, inputs)) is not None:
                energies[entry.key] = found
        speeds = {}
        for key, worker in workers.items():
            warmed[key] = Warmed(**worker.ask("warm"))
            speeds[key] = warmed[key].ms

        def turn(key: Key, discard: int, calls: int) -> None:
            answer = workers[key].ask("turn", discard=discard, calls=calls)
            samples[key].append(float(np.median(answer["ns"])) / 1e6)
            if answer["joules"] is not None:
                joules[key].append(answer["joules"])

        play(speeds, turn, **schedule)
    energies.update({key: _counted(values) for key, values in joules.items() if values})
    values = {key: np.asarray(each) for key, each in samples.items()}
    return Measurement(values, threads, batch, machine(), footprints, energies, warmed)


def inputs_for(
    name: str,
    expected: Sequence[Input],
    x: np.ndarray | tuple[np.ndarray, ...] | None,
    batch: int,
    size: tuple[int, int] | None = None,
) -> tuple[np.ndarray, ...]:
    """The inputs (batch, ...) that a file is measured with, by order, in the types that it takes.

    Args:
        name: of the file, for what is said.
        expected: its inputs.
        x, batch: as in `measure_apart`.
        size: (height, width) of images, where the file leaves them open.
    """
    for each in expected:
        if each.shape and each.shape[0] not in (None, batch):
            raise SettingsError(f"{name} has a fixed batch of {each.shape[0]}, so it cannot be measured with {batch}")
    if x is None:
        return made_inputs(name, expected, batch, size=size)
    given = x if isinstance(x, tuple) else (x,)
    if (fewest := min(map(len, given))) < batch:
        raise SettingsError(f"a batch of {batch} needs as many inputs, got {fewest}")
    into = expected if len(expected) == len(given) else [None] * len(given)  # the worker refuses another number of them
    return tuple(as_taken(each[:batch], one) for each, one in zip(given, into, strict=True))


def _check_names(entries: Sequence[Entry]) -> None:
    if not entries:
        raise SettingsError("there is nothing to measure; give at least one file")
    keys = [entry.key for entry in entries]
    if len(set(keys)) != len(keys):
        raise SettingsError(f"two contenders have the same name and runtime: {keys}; give them different names")


def _counted(joules: list[float]) -> Energy:
    median, low, high = bootstrap_median(np.asarray(joules))
    return Energy(median, low, high, "counters", "all that the processor's package used meanwhile, by its own counters")
