"""Where a model's time goes, layer by layer, beside its bytes and multiply-adds.

The costs are those of `tersenet.deploy.work`, for one sample. The times are measured in one of three ways:

- "onnxruntime": the ONNX file that would ship runs under ONNX Runtime's own profiler, which times each operator of the
  optimised graph to the microsecond (`tersenet.deploy.profile_onnx` says how these find back to layers).
- "openvino": the same file in OpenVINO, whose counters time its operators (`tersenet.deploy.profile_openvino`).
- "pytorch": the captured graph runs node by node with a clock around each.

A model may also be an ONNX file itself (`tersenet.deploy.profile_file`), whose rows are then its operators.

Every measured time is in exactly one row, so the shares sum to 1: what belongs to no layer, such as a change of memory
layout that the runtime put in, is a row of its own under the operator's name. A layer that the runtime folded or fused
into another takes no time of its own; its work is in the other's time. A profiler costs time itself, so the latency of
the whole model, measured without it, stands beside the sum; where the two are far apart, both are measured again, and
what remains is explained (`tersenet.deploy.disagreement`). `tersenet.deploy.causes` adds what limits each layer.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import fx, nn

from tersenet.deploy.disagreement import APART, times_apart, why_apart
from tersenet.deploy.machine import machine
from tersenet.deploy.made_inputs import made_inputs
from tersenet.deploy.measure import Contender, measure
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.profile_file import works_of_file
from tersenet.deploy.profile_onnx import Numbered, OnnxProfiler, Times, numbered, owners, told_apart
from tersenet.deploy.profile_openvino import OpenvinoProfiler
from tersenet.deploy.runtimes import Runner, open_file, open_module
from tersenet.deploy.work import Key, Work, works_of
from tersenet.errors import SettingsError, require
from tersenet.graph.capture import Example
from tersenet.graph.costs import costs
from tersenet.graph.trace import trace

Arrays = tuple[np.ndarray, ...]  # all inputs by order
PROFILED = ("onnxruntime", "openvino", "pytorch")
_CALLS, _DISCARD = 10, 2  # of each turn; with 20 turns 240 runs are profiled


class Profiler(Protocol):
    """Runs a model and keeps the times of its parts."""

    def __call__(self, x: Arrays) -> None: ...
    def times(self) -> Times: ...


def profile_model(
    model: nn.Module, example: Example, *, runtime: str | None = None, threads: int = 1, batch: int = 1
) -> dict[str, Any]:
    """Costs and measured time of each layer, as JSON.

    `rows` are in model order, then what belongs to no layer (`layer` is false there). `ms` is the median over all runs,
    summed over the operators of a row, or None where a layer has none of its own; `share` is of the sum of all `ms`.
    Parameters, multiply-adds and bytes are for one sample, times for one call with `batch` samples. `intensity` is
    flops per byte moved, `channels` the shape that decides how well a layer fills the machine, or None. `totals` sums
    the rows. `latency_ms` is the whole model without the profiler and `profiled_latency_ms` with it; they are measured
    in turns, and the times come from the latter. `disagreement` says why these and the sum are far apart, else None.

    Args:
        model: any module, quantized by us or not; it is left as it was.
        example: (N, ...) input, or a tuple of all inputs; repeated or cut to `batch` samples.
        runtime: one of `PROFILED`; None takes ONNX Runtime where it is installed, else PyTorch.
        threads: how many one call may use.
    Raises:
        SettingsError: on another runtime, or threads or a batch below 1.
        TraceError: when the forward cannot be captured.
        MissingExtra: when the runtime that was asked for is not installed.
    """
    runtime = _default() if runtime is None else runtime
    _check(runtime, threads, batch, PROFILED)
    model = copy.deepcopy(model)
    for module in model.modules():
        module.training = False  # an exported module refuses eval(), and has nothing to switch
    given = example if isinstance(example, tuple) else (example,)
    x = tuple(each.detach()[torch.arange(batch) % len(each)] for each in given)
    arrays = tuple(each.numpy() for each in x)
    layers = costs(model, x)
    known = {(layer.path, layer.kind) for layer in layers}
    model = model if runtime == "pytorch" else told_apart(model)
    graph = trace(model, x)
    keys = {node: key for node in graph.graph.nodes if (key := _key(graph, node)) in known and key is not None}
    works = works_of(graph, layers, keys, integers=runtime != "pytorch")
    if runtime == "pytorch":
        return _found(works, open_module(model, threads), lambda: _TorchProfiler(graph), arrays, runtime, threads)
    with tempfile.TemporaryDirectory() as folder:
        runner = open_file(export_onnx(model, x, Path(folder) / "model.onnx"), runtime, threads)
        _check_batch(runner, batch)
        assert runner.path is not None
        source = numbered(runner.path, Path(folder), lambda proto: owners(proto, graph, keys))
        opened = functools.partial(_profiler, source, runtime, folder, threads)
        return _found(works, runner, opened, arrays, runtime, threads)


def profile_file(
    path: str | Path,
    *,
    runtime: str | None = None,
    threads: int = 1,
    batch: int = 1,
    size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """The same of an ONNX file as it is, float or quantized; its operators are the rows. The inputs are noise.

    Args:
        path: .onnx
        runtime: "onnxruntime" (None) or "openvino".
        size: (height, width) of the noise, where the file takes images of any size.
    Raises:
        SettingsError: as `profile_model`; when the file takes inputs of any size, or integers.
        FileError: when the file is missing or damaged.
    """
    runtime = "onnxruntime" if runtime is None else runtime
    _check(runtime, threads, batch, PROFILED[:2])
    runner = open_file(path, runtime, threads)
    _check_batch(runner, batch)
    x = made_inputs(str(path), runner.expected, batch, size=size)
    works, rows = works_of_file(require("onnx", "onnx", "read ONNX files").load(path))
    with tempfile.TemporaryDirectory() as folder:
        source = numbered(Path(path), Path(folder), lambda _: rows)
        opened = functools.partial(_profiler, source, runtime, folder, threads)
        return _found(works, runner, opened, x, runtime, threads)


def _check(runtime: str, threads: int, batch: int, allowed: Sequence[str]) -> None:
    if runtime not in allowed:
        raise SettingsError(f"layers cannot be timed in {runtime!r}; allowed: {', '.join(allowed)}")
    if threads < 1 or batch < 1:
        raise SettingsError(f"threads and batch must be at least 1, got {threads} and {batch}")


def _check_batch(runner: Runner, batch: int) -> None:
    for each in runner.expected:
        if each.shape and each.shape[0] not in (None, batch):
            raise SettingsError(
                f"the file has a fixed batch of {each.shape[0]}, so it cannot be profiled with {batch}; "
                "choose that batch"
            )


def _default() -> str:
    needed = ("onnxruntime", "onnx", "onnxscript")
    return "onnxruntime" if all(importlib.util.find_spec(package) is not None for package in needed) else "pytorch"


def _profiler(source: Numbered, runtime: str, folder: str, threads: int) -> Profiler:
    if runtime == "openvino":
        return OpenvinoProfiler(source, threads)
    return OnnxProfiler(source, Path(folder), threads)


def _found(
    works: Sequence[Work],
    runner: Runner,
    opened: Callable[[], Profiler],
    x: Arrays,
    runtime: str,
    threads: int,
) -> dict[str, Any]:
    """Measures, again where sum and latency are far apart, and puts the times of the better try into the rows."""
    tries = []
    for _ in range(2):
        profiler = opened()
        contenders = [Contender("plain", runner, x), Contender("profiled", profiler, x, runtime)]
        measured = measure(contenders, calls=_CALLS, discard=_DISCARD, threads=threads, batch=len(x[0]))
        times = profiler.times()
        apart = times_apart(measured.latency("plain")["median"], _sum(times))
        tries.append((apart, measured, times))
        if apart <= APART:
            break
    _, measured, times = min(tries, key=lambda each: each[0])
    rows = _rows(works, times)
    return {
        "runtime": runtime,
        "threads": threads,
        "batch": len(x[0]),
        "machine": machine(),
        "rows": rows,
        "totals": _totals(rows),
        "latency_ms": measured.latency("plain"),
        "profiled_latency_ms": measured.latency("profiled"),
        "disagreement": why_apart(measured, _sum(times), sum(map(len, times.values())), runtime),
    }


def _sum(times: Times) -> float:
    return sum(map(sum, times.values()))


class _TorchProfiler(fx.Interpreter):
    """Runs a graph node by node and keeps the nanoseconds of each."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.graph_module = graph
        self.samples: dict[fx.Node, list[int]] = defaultdict(list)

    def __call__(self, x: Arrays) -> None:
        with torch.inference_mode():
            self.run(*map(torch.from_numpy, x))

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter_ns()
        result = super().run_node(n)
        self.samples[n].append(time.perf_counter_ns() - start)
        return result

    def times(self) -> Times:
        """Median milliseconds of each node, under the row that it belongs to."""
        times: Times = defaultdict(list)
        for node, samples in self.samples.items():
            key = _key(self.graph_module, node)
            if key is not None:
                times[key].append(float(np.median(samples)) / 1e6)
        return times


def _key(graph: fx.GraphModule, node: fx.Node) -> Key | None:
    """(path, kind) as in the rows of `costs`; None for a node that is no work."""
    if node.op == "call_module":
        return str(node.target), type(graph.get_submodule(str(node.target))).__name__.removeprefix("Parametrized")
    if node.op != "call_function":
        return None
    name = str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target))
    return node.meta.get("path", ""), name if name.startswith("_") else name.rstrip("_")


def _rows(works: Sequence[Work], times: Times) -> list[dict[str, Any]]:
    """Each layer with its times, in model order, then the times that no layer has, the longest first."""
    known = {work.key for work in works}
    others = sorted((key for key in times if key not in known), key=lambda key: -sum(times[key]))
    total = _sum(times)
    rows = []
    for work in [*works, *(Work(*key) for key in others)]:
        spent = sum(times[work.key]) if work.key in times else None
        moved = work.weight_bytes + work.activation_bytes
        rows.append(
            {
                "path": work.path,
                "kind": work.kind,
                "layer": work.key in known,
                "calls": len(times.get(work.key, ())),
                "params": work.params,
                "param_bytes": work.param_bytes,
                "macs": work.macs,
                "precision": work.precision,
                "weight_bytes": work.weight_bytes,
                "activation_bytes": work.activation_bytes,
                "bytes_moved": moved,
                "intensity": 2 * work.macs / max(moved, 1),
                "channels": {name: getattr(work, name) for name in ("inputs", "outputs", "groups", "positions")}
                if work.outputs
                else None,
                "output_shape": list(work.output_shape),
                "ms": spent,
                "share": (spent or 0.0) / total if total else 0.0,
            }
        )
    return rows


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    sums = {name: sum(row[name] for row in rows) for name in ("params", "param_bytes", "macs", "bytes_moved")}
    sums["ms"] = sum(row["ms"] or 0.0 for row in rows)
    return {**sums, "intensity": 2 * sums["macs"] / max(sums["bytes_moved"], 1)}
