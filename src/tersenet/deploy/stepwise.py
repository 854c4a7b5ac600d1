"""An int8 ONNX file compared with its simulation quantizer by quantizer, in steps of each grid.

At the outputs of a deep int8 network a whole step of error in one layer cannot be told from roundings that fell to the
other side (see `Reference.tolerances`). At a quantizer it can: the simulation computes each one from the integers that
the file itself had before it, not from its own. Then a right file's integer is the simulation's value rounded: within
half a step of it, up to float32. This finds a zero point that is off by one, and in which layer it is. Every integer is
an output of a copy of the file; that keeps some operators from being merged (OpenVINO's additions), so the file itself
is compared at its outputs as well (`verify.compare`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from tersenet.bricks.quantizer import Quantizer
from tersenet.deploy.perturbed import PIECE, ROUNDING, Perturbed
from tersenet.deploy.reference import Reference, difference, run
from tersenet.deploy.runner import Array
from tersenet.deploy.runtimes import open_file
from tersenet.errors import ExportError, require

# Beyond half a step: float32 sums of a few thousand products are off by less than a thousandth of a step.
SLACK = 0.05
# Where float operators between two quantizers enlarge that: never as much as an integer that is off by one shows.
_MOST_SLACK = 0.4
_OUTPUT_FACTOR, _FLOOR = 16.0, 1e-5


@dataclass(frozen=True)
class Steps:
    """How far a file is from its simulation at the quantizers.

    Args:
        beyond: largest distance of an integer from the unrounded value of the simulation beyond half a step, in steps.
        share: of the integers that are beyond by more than `SLACK`, at the first quantizer where one is; 0 to 1.
        node: that quantizer, or "output"; empty when there is none.
        quantizers: how many were compared.
    """

    beyond: float
    share: float
    node: str
    quantizers: int


def stepwise(path: Path, runtime: str, reference: Reference) -> Steps | None:
    """Compares a file at each of its quantizers, and at its outputs behind them; None where that cannot be done.

    Args:
        path: an .onnx file of an int8 model.
        runtime: one that reads it.
    Raises:
        ExportError: when the file has more or fewer quantizers than the model, or the runtime cannot open the copy.
    """
    onnx = require("onnx", "onnx", "read ONNX files")
    proto = onnx.load(str(path))
    places = _integers(proto.graph)
    graph = reference.graph
    nodes = _quantizers(graph)
    if len(places) != len(nodes):
        if len(places) != _when_exported(reference):
            raise ExportError(f"{path} rounds activations at {len(places)} places, the model at {len(nodes)}")
        return None  # the exporter merged alike ones; which is which cannot be said
    outputs = len(proto.graph.output)
    for name in places:
        proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(proto.SerializeToString())
        runner = open_file(copy, runtime)
        found = [runner.run_all(batch) for batch in reference.batches]
    signed = {node.name: each for node, each in zip(nodes, places.values(), strict=True)}
    forced, noise = _Forced(graph, signed), _Forced(graph, signed, ROUNDING)
    missed: list[bool] = []
    for batch, values in zip(reference.batches, found, strict=True):
        forced.give(values[outputs:])
        expected = run(forced, batch)
        noise.give(values[outputs:])
        for plain, noisy, output in zip(expected, run(noise, batch), values[:outputs], strict=True):
            error = difference(plain, output.reshape(plain.shape))
            finite = np.abs(plain[np.isfinite(plain)]).max(initial=0.0)
            allowed = _OUTPUT_FACTOR * difference(plain, noisy).max(initial=0.0) + _FLOOR * finite
            missed.append(bool(error.max(initial=0.0) > allowed))
    beyond = max((each.beyond for each in forced.seen.values()), default=0.0)
    integers = [values[outputs:] for values in found]
    for node in nodes:  # in the order of the forward
        if (seen := forced.seen[node.name]).beyond > SLACK and seen.beyond > _slack(reference, node, signed, integers):
            return Steps(beyond, seen.share, node.name, len(nodes))
    return Steps(beyond, 0.0, "output" if any(missed) else "", len(nodes))


def _slack(
    reference: Reference, quantizer: fx.Node, signed: Mapping[str, bool], integers: Sequence[tuple[Array, ...]]
) -> float:
    """How far beyond half a step a right integer may be at a quantizer, in steps: what float32 noise since the integers
    before does there, as at the outputs. A chain of float operators, such as an attention, may enlarge it."""
    graph, source = reference.graph, quantizer.args[0]
    assert isinstance(source, fx.Node)
    most = 0.0
    for batch, values in zip(reference.batches, integers, strict=True):
        kept = []
        for rounding in (0.0, ROUNDING):
            forced = _Forced(graph, signed, rounding, [source.name])
            forced.give(values)
            run(forced, batch)
            kept.append(forced.kept[source.name].numpy())
        most = max(most, float(difference(*kept).max(initial=0.0)))
    step = float(graph.get_submodule(str(quantizer.target)).scale.abs())  # type: ignore[operator]
    return min(_MOST_SLACK, _OUTPUT_FACTOR * most / step)


def _integers(graph: Any) -> dict[str, bool]:
    """Names of the rounded activations of a file, in order, of QuantizeLinear or of the Clip behind it, and whether
    they are int8; else they are uint8.

    What is rounded and hangs on constants alone is no activation; the exporter makes one of those that are alike.
    """
    int8 = {tensor.name for tensor in graph.initializer if tensor.data_type == tensor.INT8}
    clips = {node.input[0]: node.output[0] for node in graph.node if node.op_type == "Clip"}
    live = {value.name for value in graph.input}
    found = {}
    for node in graph.node:
        if live.intersection(node.input):
            live.update(node.output)
            if node.op_type == "QuantizeLinear":
                found[clips.get(node.output[0], node.output[0])] = len(node.input) > 2 and node.input[2] in int8
    return found


def _quantizers(graph: fx.GraphModule) -> list[fx.Node]:
    """The calls of quantizers in a captured graph that hang on an input, in order."""
    live: set[fx.Node] = set()
    found = []
    for node in graph.graph.nodes:
        if node.op == "placeholder" or live.intersection(node.all_input_nodes):
            live.add(node)
            if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), Quantizer):
                found.append(node)
    return found


def _when_exported(reference: Reference) -> int:
    """At how many places a file rounds activations that is written anew from the model."""
    from tersenet.deploy.onnx import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(reference.model, reference.example, Path(folder) / "again.onnx")
        return len(_integers(require("onnx", "onnx", "read ONNX files").load(str(path)).graph))


@dataclass
class _Seen:
    beyond: float = 0.0
    count: int = 0
    off: int = 0

    def add(self, distance: Tensor) -> None:
        """Counts some integers in; of how far they are from what was rounded, in steps, NaN where that is NaN."""
        off = distance.abs_().nan_to_num_(0.0)
        most = float(off.max()) - 0.5
        self.beyond = max(self.beyond, most)
        self.count += off.numel()
        self.off += int((off > 0.5 + SLACK).sum()) if most > SLACK else 0

    @property
    def share(self) -> float:
        return self.off / max(1, self.count)


class _Forced(Perturbed):
    """Computes every quantizer from the integers of a file, and keeps how far they are from its own values.

    Args:
        signed: node of a quantizer -> whether the file has its integers as int8 around 0, in place of uint8 around 128.
    """

    def __init__(
        self, graph: fx.GraphModule, signed: Mapping[str, bool], rounding: float = 0.0, keep: Collection[str] = ()
    ) -> None:
        super().__init__(graph, 0, rounding, keep=keep)
        self.signed = signed
        self.seen: dict[str, _Seen] = {}
        self.given: Iterator[Array] = iter(())
        self.name = ""

    def give(self, values: tuple[Array, ...]) -> None:
        self.given = iter(values)

    def run_node(self, n: fx.Node) -> Any:
        self.name = n.name
        return super().run_node(n)

    def quantize(self, path: str, quantizer: Quantizer, x: Tensor) -> Tensor:
        if self.name not in self.signed:
            return quantizer(x)
        given = torch.from_numpy(np.ascontiguousarray(next(self.given)))
        zero, scale = int(quantizer.zero_point), float(quantizer.scale.abs())
        moved = self.signed[self.name]  # written as int8 around 0, which is 128 here
        seen = self.seen.setdefault(self.name, _Seen())
        if given.numel() != x.numel():
            seen.beyond, seen.count, seen.off = float("inf"), seen.count + x.numel(), seen.off + x.numel()
            return quantizer(x)
        made = torch.empty(x.shape, dtype=torch.float32)
        for value, q, into in _pieces(x, given, made):
            into.copy_(q).add_(128 if moved else 0)
            if not self.rounding:  # the other run is for its outputs
                seen.add((value / scale).add_(zero).clamp_(quantizer.low, quantizer.high).sub_(into))
            into.sub_(zero).mul_(scale)
        return made.to(x.dtype)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors of one size flat, in pieces that stay in the processor's cache."""
    flat = [each.reshape(-1) for each in tensors]
    for start in range(0, len(flat[0]), PIECE):
        yield tuple(each[start : start + PIECE] for each in flat)
