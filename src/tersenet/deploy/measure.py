"""How long one call takes, measured so that two can be compared: contenders take turns.

Files are measured each in a process of its own (`measure_files`); what is in memory, in this one (`measure`).

A machine's speed drifts with its clock, its temperature and its neighbours, by far more than the differences that
matter here. Contenders that are measured one after another differ by that drift; contenders that take short turns, in
an order shuffled anew each round, share it, and their ratio within a round hardly feels it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tersenet.deploy.apart import Entry, measure_apart
from tersenet.deploy.machine import machine
from tersenet.deploy.runtimes import RUNTIMES, Runner, runtime_for, torch_threads
from tersenet.deploy.timings import Measurement
from tersenet.deploy.turns import LEAST_TURNS, Key, check_schedule, play
from tersenet.errors import SettingsError

Clock = Callable[[], int]


@dataclass(frozen=True)
class Contender:
    """One that takes turns.

    Args:
        name: of the file, or of what is called.
        work: an open file, or any callable of one input.
        x: its input, (N, ...); of an open file with several inputs a tuple.
        runtime: where it runs; a Runner says so itself.
    """

    name: str
    work: Runner | Callable[[Any], Any]
    x: Any
    runtime: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.work.runtime if isinstance(self.work, Runner) else self.runtime

    @property
    def call(self) -> Callable[[Any], Any]:
        """A Runner's bare call: its checks of the input are ours, not the runtime's."""
        if not isinstance(self.work, Runner):
            return self.work
        bare = self.work.call
        return (lambda several: bare(*several)) if isinstance(self.x, tuple) else bare


def measure(
    contenders: Sequence[Contender],
    *,
    turns: int = LEAST_TURNS,
    calls: int = 50,
    discard: int = 10,
    batch: int = 1,
    threads: int = 1,
    seed: int = 0,
    cold: bool = False,
    budget_s: float | None = None,
    progress: bool = False,
    rough: bool = False,
    clock: Clock = time.perf_counter_ns,
) -> Measurement:
    """Times the contenders in turns, in one process.

    With one thread the process is pinned to one core (unless OpenVINO takes part, see `_pins`), PyTorch's threads are
    set, and the garbage collector is off; all three are put back afterwards, also after an interrupt.

    Args:
        turns: at least 20, for the intervals rest on them; fewer where it is `rough`.
        calls: timed calls per turn. A call of more than 5 ms gets fewer, down to 5.
        discard: calls before them that are not counted, fewer in proportion.
        batch: what N of the inputs is; kept beside the figures.
        threads: what the runtimes were opened with; kept beside the figures.
        seed: of the order.
        cold: single calls alternate, with nothing discarded, so that each finds the caches as the others left them.
        budget_s: aim at this many seconds in all by fewer calls per turn; never fewer than 20 turns of 5 calls.
        progress: a bar on standard error.
        rough: only medians will be read, so that any number of turns does.
        clock: nanoseconds; another one is for tests.
    Raises:
        SettingsError: on fewer than 20 turns (of a rough one, 1) or 5 calls, no contenders, two of one name and
            runtime, or an input of another batch.
    """
    check_schedule(turns, calls, discard, threads, least_turns=1 if rough else LEAST_TURNS)
    _check(contenders, batch)
    by_key = {contender.key: contender for contender in contenders}
    samples: dict[Key, list[float]] = {key: [] for key in by_key}

    def turn(key: Key, discard: int, calls: int) -> None:
        samples[key].append(_turn(by_key[key], discard, calls, clock))

    with _steady(threads, _pins(contenders, threads)):
        speeds = {key: _probe(contender, clock) for key, contender in by_key.items()}
        play(speeds, turn, turns=turns, calls=calls, discard=discard, seed=seed, cold=cold, budget_s=budget_s,
             progress=progress)  # fmt: skip
    values = {key: np.asarray(each) for key, each in samples.items()}
    return Measurement(values, threads, batch, machine())


def measure_files(
    paths: Sequence[str | Path],
    runtimes: Sequence[str] | None = None,
    *,
    x: np.ndarray | tuple[np.ndarray, ...] | None = None,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    threads: int = 1,
    **settings: Any,
) -> Measurement:
    """Measures files in runtimes, all in one run, each in its own process; with what opening and warming up cost.

    Args:
        paths: of the files, each of which is a contender in each runtime that reads it.
        runtimes: names of `RUNTIMES`; None takes each file's own.
        x: real inputs, of which the first `batch` are used, of several inputs a tuple; None draws normal noise of the
            files' own shapes.
        size: (height, width) of noise for files that take images of any size.
        settings: as in `tersenet.deploy.apart.measure_apart`.
    Raises:
        SettingsError: when a file can be read by none of the runtimes, or has open sizes or takes integers and no `x`
            is given; on more threads than cores.
        DataError, FileError, MissingExtra: as `open_file` and `Runner.run`; FileError also when a process dies.
    """
    entries = [
        Entry(path, Path(path), runtime, size=size)
        for path in dict.fromkeys(map(str, paths))
        for runtime in serving(path, runtimes)
    ]
    return measure_apart(entries, x=x, batch=batch, threads=threads, **settings)


def serving(path: str | Path, runtimes: Sequence[str] | None) -> list[str]:
    """Those of the named runtimes that read this file; None takes the file's own.

    Raises:
        SettingsError: on an unknown runtime, or when none of them reads it.
    """
    if runtimes is None:
        return [runtime_for(path)]
    for name in runtimes:
        if name not in RUNTIMES:
            raise SettingsError(f"there is no runtime {name!r}; the known ones are {', '.join(RUNTIMES)}")
    found = [name for name in dict.fromkeys(runtimes) if Path(path).suffix.lower() in RUNTIMES[name].suffixes]
    if not found:
        raise SettingsError(f"none of {', '.join(runtimes)} reads {Path(path).name}; {runtime_for(path)} does")
    return found


def _check(contenders: Sequence[Contender], batch: int) -> None:
    if not contenders:
        raise SettingsError("there is nothing to measure; give at least one contender")
    keys = [contender.key for contender in contenders]
    if len(set(keys)) != len(keys):
        raise SettingsError(f"two contenders have the same name and runtime: {keys}; give them different names")
    for contender in contenders:
        for x in contender.x if isinstance(contender.x, tuple) else (contender.x,):
            if hasattr(x, "shape") and x.shape[0] != batch:
                raise SettingsError(f"{contender.name} has an input of batch {x.shape[0]}, the measurement {batch}")


def _probe(contender: Contender, clock: Clock) -> float:
    """Milliseconds of one call, roughly; the first ones allocate and are not counted."""
    for _ in range(2):
        contender.call(contender.x)
    return _turn(contender, 0, 1, clock)


def _turn(contender: Contender, discard: int, calls: int, clock: Clock) -> float:
    """The median milliseconds of one turn's timed calls."""
    call, x = contender.call, contender.x
    for _ in range(discard):
        call(x)
    times = []
    for _ in range(calls):
        start = clock()
        call(x)
        times.append(clock() - start)
    return float(np.median(times)) / 1e6


@contextlib.contextmanager
def _steady(threads: int, pin: bool) -> Iterator[None]:
    """One core where asked, PyTorch's threads set, the garbage collector off; all put back whatever happens."""
    collecting = gc.isenabled()
    # PyTorch counts the cores when it is imported, so it must not be imported here, once pinned to one.
    with torch_threads(threads) if "torch" in sys.modules else contextlib.nullcontext(), _pinned(pin):
        gc.collect()
        gc.disable()
        try:
            yield
        finally:
            if collecting:
                gc.enable()


def _pins(contenders: Sequence[Contender], threads: int) -> bool:
    """Whether to pin: one thread is asked for, and nobody moves it.

    OpenVINO 2026.4 moves the calling thread, at each call, to the cores that it saw when the file was opened, and back
    afterwards, whatever ENABLE_CPU_PINNING says. On a pinned thread each call so changes cores twice and was measured 2
    to 7 times slower; then nobody is pinned, for all must run alike.
    """
    return threads == 1 and all(contender.key[1] != "openvino" for contender in contenders)


@contextlib.contextmanager
def _pinned(pin: bool) -> Iterator[None]:
    """This thread on one core, where the system can: moving between cores costs caches.

    The last core that is allowed: the first ones serve most interrupts.
    """
    if not pin or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
