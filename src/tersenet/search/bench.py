"""Times and weighs shapes of one network in a runtime, without training and without exporting each of them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tersenet.deploy.apart import Entry, measure_apart
from tersenet.deploy.machine import machine
from tersenet.deploy.measure import Contender, measure
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.quiet import quiet_native
from tersenet.deploy.runner import as_array
from tersenet.deploy.runtimes import RUNTIMES, open_file
from tersenet.deploy.timings import Measurement
from tersenet.deploy.variants import Variants
from tersenet.errors import SettingsError
from tersenet.progress import progressing
from tersenet.search.sites import Picks, Site
from tersenet.search.weigh import count_macs, memory_bytes
from tersenet.step import Step
from tersenet.task import Task, batch_input

# Files that take turns at once, beside the unchanged network; more would push each other out of the caches.
_GROUP = 10
# The unchanged network is opened so often among them. Where its memory comes to lie changes the time of a file by up to
# five percent from one opening to the next, and what the unchanged network errs by is in each of the changes.
_BASES = 3
# Only medians are read, so fewer turns do than intervals need.
_TURNS, _CALLS, _DISCARD = 12, 30, 6
# Of one file in one turn, less where so many files are timed that they would take longer than this in all; slow
# networks get 5 calls all the same.
_TURN_S, _ALL_S = 0.0125, 12.0
# Of the files whose times shares are taken of, each in a process of its own.
_CALLS_APART, _DISCARD_APART = 20, 4


def device_of(runtime: str, threads: int, batch: int) -> dict[str, Any]:
    """What a latency depends on beside the network."""
    here = machine()
    version = metadata.version(RUNTIMES[runtime].package)
    return {
        "cpu": here["cpu"], "cores": here["cores"], "runtime": runtime, "version": version, "threads": threads,
        "batch": batch,
    }  # fmt: skip


def check_runtime(runtime: str) -> None:
    """Raises SettingsError on a runtime that there is not, or that does not read ONNX files."""
    able = [name for name, entry in RUNTIMES.items() if ".onnx" in entry.suffixes]
    if runtime not in able:
        raise SettingsError(
            f"a search times its candidates as ONNX files, which {runtime} does not read; use {' or '.join(able)}"
        )


class Bench:
    """One network before its search, as files whose shape can be changed.

    Args:
        steps: those of the search; what trains is left out here, what has no choices is part of every file.
        sites: where the steps can pick.
        runtime: one that reads ONNX files.
        base: the file with nothing picked, where it was written already.
        whole: the same network with inputs of the original's size, where `task` has others.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        sites: Sequence[Site],
        model: nn.Module,
        task: Task,
        *,
        runtime: str,
        threads: int,
        batch: int,
        folder: Path,
        progress: bool = False,
        whole: Bench | None = None,
        base: Path | None = None,
    ) -> None:
        self.steps, self.sites, self.model, self.task = steps, {site.key: site for site in sites}, model, task
        self.runtime, self.threads, self.batch, self.folder = runtime, threads, batch, folder
        self.progress = progress
        self.base_path = folder / "base.onnx" if base is None else base
        if base is None:
            # Weights of few bits are packed when a candidate is made: packed ones cannot be sliced.
            export_onnx(self._unchanged(), task.example, self.base_path, pack=False)
        self.variants = Variants(self.base_path)
        self._memory: tuple[float, float] | None = None
        self._plans: dict[tuple[int, str, int], dict[str, Any]] = {}
        x = batch_input(next(iter(task.calibration(1)))) if task.calibrate is not None or task.train else task.example
        self.x = as_array(x[:1].repeat(batch, *[1] * (x.dim() - 1)))  # of the network's own type
        # What a share is a share of: the original with the inputs that it was made for.
        self.float_x: Any = self.x if whole is None else whole.float_x
        self.float_path: Path = folder / "float.onnx" if whole is None else whole.float_path
        if whole is None:
            export_onnx(model, task.example, self.float_path)

    def _unchanged(self) -> nn.Module:
        """The model with nothing picked; a few calibration samples do, for the numbers play no part."""
        few = [batch_input(batch)[:16] for batch in self.task.calibration(16)][:1] if _has_data(self.task) else None
        task = dataclasses.replace(self.task, calibrate=few, train=None, test=None, quiet=True)
        made = copy.deepcopy(self.model)
        for step in (each.chosen({}) for each in self.steps if each.family != "train"):
            if step is not None:
                made, _ = step.run(made, task)
        return made.eval()

    def plan(self, site: Site, index: int) -> dict[str, Any]:
        """What the site's step does to the structure at one of its settings, nothing else picked."""
        key = (site.step, site.place, index)
        if key not in self._plans:
            step = self.steps[site.step].chosen({site.place: site.settings[index]})
            self._plans[key] = {} if step is None else step.plan(self.model, self.task)
        return self._plans[key]

    def able(self, site: Site) -> bool:
        """Whether the site's last setting can be had by changing the file: the runtime then still runs it."""
        path = self.folder / "able.onnx"
        try:
            path.write_bytes(self.file({site.step: {site.place: site.settings[-1]}}))
            with quiet_native():
                open_file(path, self.runtime, self.threads).run(self.x)
        except Exception:  # noqa: BLE001 - each runtime has errors of its own for shapes that do not fit
            return False
        return True

    def file(self, picks: Picks, pack: bool = False) -> bytes:
        """The network with these picks, as an ONNX file for timing; packed, as one for weighing."""
        dropped: list[str] = []
        floated: list[str] = []
        for place, plan in self._plans_of(picks):
            dropped += plan.get("dropped", [])
            floated += [place] if place in plan.get("float", {}) else []
        return self.variants.make(self._kept(picks), dropped, floated, self._bits(picks), pack)

    def _bits(self, picks: Picks) -> dict[str, int]:
        """Place -> bits of its stored weight, where that is all that was picked there."""
        found = {}
        for index, places in picks.items():
            for place, setting in places.items():
                if (bits := self.steps[index].bits_of(setting)) is not None:
                    found[place] = bits
        return found

    def _plans_of(self, picks: Picks) -> Iterator[tuple[str, dict[str, Any]]]:
        """(place, plan) of what was picked that changes more than the bits of a weight."""
        for index, places in picks.items():
            for place, setting in places.items():
                if self.steps[index].bits_of(setting) is None:
                    site = self.sites[index, place]
                    yield place, self.plan(site, site.settings.index(setting))

    def _kept(self, picks: Picks) -> dict[str, dict[str, list[int]]]:
        """The cut of all picks together."""
        kept: dict[str, dict[str, list[int]]] = {}
        for _, plan in self._plans_of(picks):
            for path, roles in plan.get("kept", {}).items():
                into = kept.setdefault(path, {})
                for role, indices in roles.items():
                    both = set(into[role]) & set(indices) if role in into else indices
                    into[role] = sorted(both)
        return kept

    def times(
        self, candidates: Sequence[Picks], said: str, keep: Callable[[list[tuple[float, float]]], None] | None = None
    ) -> list[tuple[float, float]]:
        """(milliseconds, share of the unchanged network's) of each candidate, in groups that take turns with it.

        Args:
            said: what they are timed for.
            keep: is given all that is known after each group, in the order of the candidates.
        """
        found: list[tuple[float, float]] = []
        turn = min(_TURN_S, _ALL_S / (_TURNS * max(1, len(candidates))))
        with progressing(said, len(candidates), self.progress) as advance, collected_once():
            for start in range(0, len(candidates), _GROUP):
                group = candidates[start : start + _GROUP]
                files = {str(number): self.folder / f"variant{number}.onnx" for number in range(len(group))}
                for path, picks in zip(files.values(), group, strict=True):
                    path.write_bytes(self.file(picks))
                paths = _among(files, self.base_path)
                result = self._measure(paths, turn)
                base = statistics.median(result.latency(key)["median"] for key in paths if key not in files)
                milliseconds = [result.latency(key)["median"] for key in files]
                found += [(each, each / base) for each in milliseconds]
                if keep is not None:
                    keep(found)
                advance(len(group))
        return found

    def base_times(self) -> tuple[float, float]:
        """Milliseconds of the unchanged network and of the float file, as files that ship are measured: what a share of
        the float file's time is, hangs on them."""
        entries = [Entry("base", self.base_path, self.runtime, self.x), self._float]
        result = self._apart(entries)
        return result.latency("base")["median"], result.latency("float")["median"]

    def share_of_float(self, picks: Picks) -> float:
        """What is left of the float file's time, each file in a process of its own."""
        path = self.folder / "answer.onnx"
        path.write_bytes(self.file(picks))
        entries = [Entry("answer", path, self.runtime, self.x), self._float]
        return self._apart(entries).ratio("answer", "float").ratio

    @property
    def _float(self) -> Entry:
        return Entry("float", self.float_path, self.runtime, self.float_x)

    def _apart(self, entries: Sequence[Entry]) -> Measurement:
        return measure_apart(
            entries, batch=self.batch, threads=self.threads, calls=_CALLS_APART, discard=_DISCARD_APART, energy=False
        )

    def _measure(self, paths: dict[str, Path], turn: float) -> Measurement:
        contenders = [
            Contender(name, open_file(path, self.runtime, self.threads), self.x) for name, path in paths.items()
        ]
        return measure(
            contenders, batch=self.batch, threads=self.threads, turns=_TURNS, calls=_CALLS, discard=_DISCARD,
            budget_s=_TURNS * len(contenders) * turn, rough=True,
        )  # fmt: skip

    def weight(self, picks: Picks, kind: str) -> float:
        """Bytes, multiply-adds or bytes of memory of a candidate's file, read off the file; of settings that files do
        not show, what they save once coded."""
        saved = self._saved(picks) if kind == "bytes" else 0.0
        return self._weighed(self.file(picks, pack=kind == "bytes"), kind, self.x) - saved

    def _saved(self, picks: Picks) -> float:
        """Bytes that settings save which say how many their layer takes when coded."""
        kept, picked, saved = self._kept(picks), self._bits(picks), 0.0
        usual = 8 if any(step.family == "quantize" for step in self.steps) else 32
        for index, places in picks.items():
            for place, setting in places.items():
                if (shape := self._shape_left(place, kept)) is None:
                    continue
                bits = picked.get(place, usual)
                coded = self.steps[index].foretold_bytes(setting, shape, bits)
                saved += 0.0 if coded is None else math.prod(shape) * bits / 8 - coded
        return saved

    def _shape_left(self, place: str, kept: dict[str, dict[str, list[int]]]) -> tuple[int, ...] | None:
        """The shape of a layer's weight after a cut; None where the place is no layer with a weight."""
        weight: Any = getattr(self.model.get_submodule(place), "weight", None)
        if not isinstance(weight, torch.Tensor):
            return None
        shape = list(weight.shape)
        for role, indices in kept.get(place, {}).items():
            dim = 1 if role == "in" else 0
            shape[dim] = min(shape[dim], len(indices))
        return tuple(shape)

    def weight_of_original(self, kind: str) -> float:
        """The same of the original's float file."""
        return self._weighed(self.float_path.read_bytes(), kind, self.float_x)

    def _weighed(self, file: bytes, kind: str, x: np.ndarray) -> float:
        if kind == "bytes":
            return float(len(file))
        if kind == "macs":
            return float(count_macs(file, x.shape))
        if self._memory is None:
            self._memory = memory_line(self.memories())
        rest, times = self._memory
        return rest + times * memory_bytes(file, x.shape)

    def memories(self) -> list[tuple[float, float]]:
        """(read off the file, measured) bytes of memory of the unchanged network and of the float file; () where memory
        cannot be measured."""
        entries = [Entry("base", self.base_path, self.runtime, self.x), self._float]
        found = measure_apart(entries, batch=self.batch, threads=self.threads, budget_s=0.5, energy=False)
        peaks = [found.peak_bytes(entry.key) for entry in entries]
        shapes = (self.x.shape, self.float_x.shape)
        said = [memory_bytes(entry.path.read_bytes(), shape) for entry, shape in zip(entries, shapes, strict=True)]
        return [(float(a), float(b)) for a, b in zip(said, peaks, strict=True) if b is not None]


def _among(files: dict[str, Path], base: Path) -> dict[str, Path]:
    """The files with the unchanged network `_BASES` times among them: first, last, and evenly between."""
    names = list(files)
    for number in range(_BASES):
        names.insert(round(number * len(files) / (_BASES - 1)) + number, f"base {number}")
    return {name: files.get(name, base) for name in names}


@contextlib.contextmanager
def collected_once() -> Iterator[None]:
    """What is in memory is collected now and not looked at again before the end: each measurement collects, which takes
    up to a second where much was traced. Inside of another one, only what is new is looked at."""
    inside = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not inside:
            gc.unfreeze()


def memory_line(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) so that measured ~ a + b * read off the file: what a runtime needs beside the file's own tensors.

    Args:
        pairs: of `Bench.memories`.
    """
    if len(pairs) < 2:
        return 0.0, 1.0
    (said, got), (float_said, float_got) = pairs
    slope = (float_got - got) / (float_said - said) if float_said > 1.2 * said else float_got / float_said
    slope = min(max(slope, 0.8), 3.0)  # a runtime may hold constants twice; a page more or less is no slope
    return got - slope * said, slope


def _has_data(task: Task) -> bool:
    return task.calibrate is not None or task.train is not None


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    """A folder for files that are only timed; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="tersenet-") as name:
        yield Path(name)


def images_of(task: Task, count: int) -> torch.Tensor | None:
    """Calibration inputs (N, ...), at most `count`; None without data."""
    if not _has_data(task):
        return None
    found = [batch_input(batch) for batch in task.calibration(count)]
    return torch.cat(found)[:count]
