"""Where a model's time goes, layer by layer, beside its bytes and multiply-adds.

The costs are those of `tersenet.graph.costs`, for one sample. The times are measured in one of two ways:

- "onnxruntime": the ONNX file that would ship runs under ONNX Runtime's own profiler, which times each operator of the
  optimised graph to the microsecond (`tersenet.deploy.profile_onnx` says how these find back to layers).
- "pytorch": the captured graph runs node by node with a clock around each.

Every measured time is in exactly one row, so the shares sum to 1: what belongs to no layer, such as a change of memory
layout that the runtime put in, is a row of its own under the operator's name. A layer that the runtime folded or fused
into another takes no time of its own; its work is in the other's time. A profiler costs time itself, so the latency of
the whole model, measured without it, stands beside the sum.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from tersenet.deploy.machine import machine
from tersenet.deploy.measure import Contender, measure
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.profile_onnx import Key, OnnxProfiler, Times, told_apart
from tersenet.deploy.runtimes import open_file, open_module
from tersenet.errors import SettingsError
from tersenet.graph.costs import LayerCost, costs
from tersenet.graph.trace import trace
from tersenet.report.words import bytes_text, count_text, runtime_name

if TYPE_CHECKING:
    from rich.table import Table

PROFILED = ("onnxruntime", "pytorch")
_CALLS, _DISCARD = 10, 2  # of each turn; with 20 turns 240 runs are profiled
_MARKED = 3  # so many of the slowest rows stand out in the table
_BAR = 8
_NO_COST = LayerCost("", "", 0, 0, 0, 0, 0, 0, ())


def profile_model(
    model: nn.Module, example: Tensor, *, runtime: str | None = None, threads: int = 1, batch: int = 1
) -> dict[str, Any]:
    """Costs and measured time of each layer, as JSON.

    `rows` are in model order, then what belongs to no layer (`layer` is false there). `ms` is the median over all runs,
    summed over the operators of a row, or None where a layer has none of its own; `share` is of the sum of all `ms`.
    Parameters, multiply-adds and bytes are for one sample, times for one call with `batch` samples. `intensity` is
    flops per byte moved. `totals` sums the rows. `latency_ms` is the whole model without the profiler and
    `profiled_latency_ms` with it; they are measured in turns, and the times come from the latter.

    Args:
        model: any module of one input, quantized by us or not; it is left as it was.
        example: (N, ...) input; repeated or cut to `batch` samples.
        runtime: "onnxruntime" or "pytorch"; None takes the first that is installed.
        threads: how many one call may use.
    Raises:
        SettingsError: on another runtime, or threads or a batch below 1.
        TraceError: when the forward cannot be captured.
        MissingExtra: when the runtime that was asked for is not installed.
    """
    runtime = _default() if runtime is None else runtime
    if runtime not in PROFILED:
        raise SettingsError(f"layers cannot be timed in {runtime!r}; allowed: {', '.join(PROFILED)}")
    if threads < 1 or batch < 1:
        raise SettingsError(f"threads and batch must be at least 1, got {threads} and {batch}")
    model = copy.deepcopy(model)
    for module in model.modules():
        module.training = False  # an exported module refuses eval(), and has nothing to switch
    x = example.detach()[torch.arange(batch) % len(example)]
    layers = costs(model, x)
    model = model if runtime == "pytorch" else told_apart(model)
    graph = trace(model, x)
    with tempfile.TemporaryDirectory() as folder:
        if runtime == "pytorch":
            runner = open_module(model, threads)
        else:
            runner = open_file(export_onnx(model, x, Path(folder) / "model.onnx"), runtime, threads)
            if runner.input_shape is not None and runner.input_shape[0] not in (None, batch):
                raise SettingsError(
                    f"the exported model has a fixed batch of {runner.input_shape[0]}, so it cannot be profiled with "
                    f"{batch}; choose that batch, or --runtime pytorch"
                )
        known = {(layer.path, layer.kind) for layer in layers}
        profiler: _TorchProfiler | OnnxProfiler
        if runner.path is None:
            profiler = _TorchProfiler(graph)
        else:
            keys = {node: key for node in graph.graph.nodes if (key := _key(graph, node)) in known}
            profiler = OnnxProfiler(runner.path, graph, keys, Path(folder), threads)
        inputs = x.numpy()
        contenders = [Contender("plain", runner, inputs), Contender("profiled", profiler, inputs, runtime)]
        measured = measure(contenders, calls=_CALLS, discard=_DISCARD, threads=threads, batch=batch)
        times = profiler.times()
    rows = _rows(layers, times)
    return {
        "runtime": runtime,
        "threads": threads,
        "batch": batch,
        "machine": machine(),
        "rows": rows,
        "totals": _totals(rows),
        "latency_ms": measured.latency("plain"),
        "profiled_latency_ms": measured.latency("profiled"),
    }


def profile_table(found: dict[str, Any]) -> Table:
    """The same for a terminal, at most 100 columns wide; the slowest rows stand out.

    Layers without multiply-adds that take no time of their own are left out, and counted in the caption.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows, totals = found["rows"], found["totals"]
    shown = [row for row in rows if row["ms"] is not None or row["macs"]]
    slowest = sorted(shown, key=lambda row: -row["share"])[:_MARKED]
    most = max((row["share"] for row in shown), default=0.0) or 1.0
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_footer=True, caption_justify="left")
    table.caption = _caption(found, len(rows) - len(shown))
    table.add_column("layer", f"{len(rows)} rows")
    table.add_column("kind")
    feet = [count_text(totals["macs"]), bytes_text(totals["bytes_moved"])]
    feet += [_number(totals["intensity"]), f"{totals['ms']:.3f}", "100 %"]
    for title, foot in zip(("MACs", "moved", "FLOP/B", "ms", "time"), feet, strict=True):
        table.add_column(title, foot, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in shown:
        costly = any(row is other for other in slowest)
        bar = ("█" if costly else "▒") * max(round(_BAR * row["share"] / most), 1 if row["ms"] else 0)
        cells = [""] * 3
        if row["layer"]:
            cells = [count_text(row["macs"]), bytes_text(row["bytes_moved"])]
            cells.append(_number(row["intensity"]))
        cells += ["-", ""] if row["ms"] is None else [f"{row['ms']:.3f}", f"{100 * row['share']:.1f} %"]
        name = row["path"] or ("(model)" if row["layer"] else f"(no layer, {row['calls']} x)")
        table.add_row(
            *(Text(cell) for cell in (_shortened(name, 26), _shortened(row["kind"], 20), *cells, bar)),
            style="bold yellow" if costly else "" if row["layer"] else "dim",
        )
    return table


def _caption(found: dict[str, Any], hidden: int) -> Any:
    from rich.text import Text

    total = found["totals"]["ms"]
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    lines = [
        f"{runtime_name(found['runtime'])}, {threads}, batch {found['batch']}, {found['machine']['cpu']}; "
        f"{count_text(found['totals']['params'])} parameters",
        f"latency of the model {_span(found['latency_ms'])} ms, under the profiler "
        f"{_span(found['profiled_latency_ms'])} ms; sum of the rows {total:.3f} ms",
        "MACs, bytes moved and FLOPs per byte are for one sample, without a cache",
    ]
    if hidden:
        lines.append(
            f"left out: {hidden} {'row' if hidden == 1 else 'rows'} without MACs or time of their own (folded, fused)"
        )
    return Text("\n".join(lines))


def _span(latency: dict[str, Any]) -> str:
    return f"{latency['median']:.3f} [{latency['low']:.3f}, {latency['high']:.3f}]"


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _shortened(text: str, width: int) -> str:
    """The end says which layer it is; the beginning is shared by many."""
    return text if len(text) <= width else "…" + text[1 - width :]


def _default() -> str:
    needed = ("onnxruntime", "onnx", "onnxscript")
    return PROFILED[0] if all(importlib.util.find_spec(package) is not None for package in needed) else PROFILED[1]


class _TorchProfiler(fx.Interpreter):
    """Runs a graph node by node and keeps the nanoseconds of each."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.graph_module = graph
        self.samples: dict[fx.Node, list[int]] = defaultdict(list)

    def __call__(self, x: np.ndarray) -> None:
        with torch.inference_mode():
            self.run(torch.from_numpy(x))

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


def _rows(layers: list[LayerCost], times: Times) -> list[dict[str, Any]]:
    """Each layer with its times, in model order, then the times that no layer has, the longest first."""
    known = {(layer.path, layer.kind) for layer in layers}
    others = sorted((key for key in times if key not in known), key=lambda key: -sum(times[key]))
    total = sum(map(sum, times.values()))
    rows = []
    for layer in [*layers, *(replace(_NO_COST, path=path, kind=kind) for path, kind in others)]:
        key = (layer.path, layer.kind)
        spent = sum(times[key]) if key in times else None
        rows.append(
            {
                "path": layer.path,
                "kind": layer.kind,
                "layer": key in known,
                "calls": len(times.get(key, ())),
                "params": layer.params,
                "param_bytes": layer.param_bytes,
                "macs": layer.macs,
                "bytes_moved": layer.bytes_moved,
                "intensity": layer.flops / max(layer.bytes_moved, 1),
                "output_shape": list(layer.output_shape),
                "ms": spent,
                "share": (spent or 0.0) / total if total else 0.0,
            }
        )
    return rows


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    sums = {name: sum(row[name] for row in rows) for name in ("params", "param_bytes", "macs", "bytes_moved")}
    sums["ms"] = sum(row["ms"] or 0.0 for row in rows)
    return {**sums, "intensity": 2 * sums["macs"] / max(sums["bytes_moved"], 1)}
