"""Where a file begins to differ from its model: the first operator, in the model's own names."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import fx

from tersenet.bricks.evaluating import evaluating
from tersenet.bricks.quantizer import Quantizer
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.perturbed import Perturbed
from tersenet.deploy.reference import Reference, difference
from tersenet.deploy.runner import Array
from tersenet.deploy.runtimes import open_file

_FACTOR, _FLOOR = 16.0, 1e-5


def before_quantizer(graph: fx.GraphModule, name: str) -> list[fx.Node]:
    """The operators between a quantizer and those before it, in the order of the forward."""
    found: set[fx.Node] = set()
    open_nodes = [node for node in graph.graph.nodes if node.name == name]
    while open_nodes:
        for source in open_nodes.pop().all_input_nodes:
            if source.op in ("call_module", "call_function") and source not in found and not _rounds(graph, source):
                found.add(source)
                open_nodes.append(source)
    return [node for node in graph.graph.nodes if node in found]


def first_that_differs(reference: Reference, runtime: str) -> fx.Node | None:
    """The first operator whose value differs in a runtime, of a float model that is written again with all values as
    outputs; None where they are right then, so that what is wrong is how operators are merged, or the file alone.
    """
    graph = reference.graph
    nodes = [node for node in graph.graph.nodes if node.op in ("call_module", "call_function") and _is_float(node)]
    shown = copy.deepcopy(graph)
    by_name = {node.name: node for node in shown.graph.nodes}
    output = next(node for node in shown.graph.nodes if node.op == "output")
    output.args = (tuple(by_name[node.name] for node in nodes),)
    shown.recompile()
    batch = reference.batches[-1]
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(shown, reference.example, Path(folder) / "values.onnx")
        values = open_file(path, runtime).run_all(batch)
    names = [node.name for node in nodes]
    plain, noisy = (_values(Perturbed(graph, 0, rounding, keep=names), batch) for rounding in (0.0, 2.0**-21))
    for node, value in zip(nodes, values, strict=True):
        expected = plain[node.name]
        scale = float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0))
        allowed = _FACTOR * difference(expected, noisy[node.name]).max(initial=0.0) + _FLOOR * scale
        if value.size != expected.size or difference(expected, value.reshape(expected.shape)).max(initial=0) > allowed:
            return node
    return None


def named(graph: fx.GraphModule, node: fx.Node) -> str:
    """ "layer1.0.pool (AvgPool2d)", or "relu in layer1.0"."""
    if node.op == "call_module":
        return f"{node.target} ({type(graph.get_submodule(str(node.target))).__name__})"
    kind = getattr(node.target, "overloadpacket", node.target)
    path = node.meta.get("path")
    return f"{getattr(kind, '__name__', kind)}" + (f" in {path}" if path else "")


def _values(interpreter: Perturbed, batch: tuple[Array, ...]) -> dict[str, Array]:
    with evaluating(interpreter.module), torch.inference_mode():
        interpreter.run(*(torch.from_numpy(x) for x in batch))
    return {name: np.asarray(value.float()) for name, value in interpreter.kept.items()}


def _rounds(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), Quantizer)


def _is_float(node: fx.Node) -> bool:
    dtype = node.meta.get("dtype")
    return dtype is not None and dtype.is_floating_point
