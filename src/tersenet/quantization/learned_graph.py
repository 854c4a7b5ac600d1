"""Where a training in few bits rounds: layers, activations, and which of them share a grid.

The places are those of quantization after training (graph/points.py), found with the norms folded, so that what is
trained is what the runtimes will compute when the norms are folded at the end; the norms themselves stay in the graph,
and the rounding of a layer's output comes after its norm. A value that only layers of few bits read is rounded to
their bits. A value that is also added to another, as in a residual network, has 8 bits, and is rounded once more, to
few bits, in front of the layers that read it (in the networks of arXiv:1902.08153 the additions are float).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from tersenet.bricks.brick import Brick
from tersenet.bricks.few_bits import few_bit_kind
from tersenet.bricks.learned_quantizer import LearnedQuantizer
from tersenet.bricks.quantized import QuantizedConv2d, identity_convolution
from tersenet.bricks.shortcut import PadShortcut
from tersenet.errors import SettingsError
from tersenet.graph.fold import fold_all, foldable
from tersenet.graph.outside_reads import keep_reads
from tersenet.graph.points import activation_points, insert_after, layers_on_constants
from tersenet.graph.trace import Example, said_input, trace, trace_with
from tersenet.quantization.quantize_aware import METHODS, QuantizeAware, few_bit_twin
from tersenet.step import Plan

QUANTIZERS = "quantizers"


def plan_graph(model: nn.Module, example: Example, step: QuantizeAware) -> Plan:
    """Decides on a copy, because folding norms and replacing shortcuts come first.

    Returns:
        {"input": {"shape", "dtype"}, "method", "layers": {path: scheme}, "shortcuts": {path: [channels, before, after,
        stride]}, "points": {grid: {"bits", "nodes"}}, "inputs": {grid: {"bits", "readers": {node: [layer, ...]}}},
        "float": {layer or node: why}}, or {} when no layer can be quantized. Nodes are those of the traced model with
        its norms.
    """
    graph = trace(copy.deepcopy(model), _beside(model, example))
    keep_reads(graph)
    edges = _edges(graph)
    after_norm = _after_norms(graph)
    shortcuts = _shortcuts(graph, step)
    fold_all(graph)
    for path, arguments in shortcuts.items():
        graph.add_submodule(path, identity_convolution(*arguments))
    layers: dict[str, dict[str, Any]] = {}
    floats: dict[str, str] = {}
    for path, module in graph.named_modules():
        if isinstance(module, _ConvNd | nn.Linear) and not isinstance(module, Brick) and path not in shortcuts:
            reason = _why_float(path, module, step, edges)
            if reason is None:
                layers[path] = step.scheme(path in edges)
            else:
                floats[path] = reason
    if not layers:
        return {}
    points = activation_points(graph, {*layers, *shortcuts}, copies=shortcuts)
    if fixed := layers_on_constants(graph, layers, points):
        layers = {path: scheme for path, scheme in layers.items() if path not in fixed}
        floats.update(dict.fromkeys(fixed, "reads constants, which are not rounded"))
        if not layers:
            return {}
        points = activation_points(graph, {*layers, *shortcuts}, copies=shortcuts)
    for name, kind in points.floats.items():
        floats.setdefault(name, f"{kind} has no int8 operator in every runtime")
    grids, inputs = _grids(graph, points.groups, layers)
    return {
        "input": said_input(example),
        "method": step.method,
        "layers": layers,
        "shortcuts": shortcuts,
        "points": {
            name: {"bits": bits, "nodes": [after_norm.get(n, n) for n in nodes]}
            for name, (bits, nodes) in grids.items()
        },
        "inputs": {
            name: {"bits": bits, "readers": {after_norm.get(n, n): paths for n, paths in readers.items()}}
            for name, (bits, readers) in inputs.items()
        },
        "float": floats,
    }


def apply_graph(model: nn.Module, plan: Plan) -> fx.GraphModule:
    """The traced model with bricks in place of layers and quantizers at the points.

    Raises:
        SettingsError: when the plan is another model's.
    """
    device = next((p.device for p in model.parameters()), None)
    graph = trace_with(model, plan["input"])
    keep_reads(graph)
    make = partial(LearnedQuantizer, method=METHODS[plan["method"]][1])
    try:
        for path, arguments in plan["shortcuts"].items():
            graph.add_submodule(path, QuantizedConv2d.of(identity_convolution(*arguments)))
        for path, scheme in plan["layers"].items():
            graph.add_submodule(path, few_bit_twin(graph, path, scheme))
        for name, grid in plan["points"].items():
            insert_after(graph, {name: grid["nodes"]}, QUANTIZERS, partial(make, grid["bits"]))
        for name, grid in plan["inputs"].items():
            graph.add_submodule(f"{QUANTIZERS}.{name}", make(grid["bits"]))
            for node, readers in grid["readers"].items():
                _insert_before(graph, node, readers, f"{QUANTIZERS}.{name}")
    except (AttributeError, KeyError) as error:
        raise SettingsError(
            f"the plan does not fit: this model has no {error}; apply it to the model it was made for"
        ) from error
    graph.recompile()
    return graph.to(device) if device is not None else graph


def _insert_before(graph: fx.GraphModule, node: str, readers: Iterable[str], path: str) -> None:
    """Calls a quantizer on the rounded value of a node, for some of the layers that read it."""
    source = next((n for n in graph.graph.nodes if n.name == node), None)
    if source is None:
        raise KeyError(node)
    rounded = next(iter(source.users))
    with graph.graph.inserting_after(rounded):
        new = graph.graph.call_module(path, (rounded,))
    new.meta = dict(rounded.meta)
    for user in list(rounded.users):
        if user.op == "call_module" and user.target in readers:
            user.replace_input_with(rounded, new)


def _after_norms(graph: fx.GraphModule) -> dict[str, str]:
    """Node of a layer -> node of the norm that can be folded into it."""
    norms = {norm: layer for layer, norm in foldable(graph)}
    return {node.args[0].name: node.name for node in graph.graph.nodes if node.target in norms}


def _shortcuts(graph: fx.GraphModule, step: QuantizeAware) -> dict[str, list[int]]:
    """Path -> what `identity_convolution` takes, for each zero-padding shortcut."""
    found: dict[str, list[int]] = {}
    for node in graph.graph.nodes:
        brick = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(brick, PadShortcut):
            arguments = [int(node.args[0].meta["shape"][1]), brick.before, brick.after, brick.stride]
            if step.matches(str(node.target), identity_convolution(*arguments)):
                found[str(node.target)] = arguments
    return found


def _why_float(path: str, module: nn.Module, step: QuantizeAware, edges: set[str]) -> str | None:
    if few_bit_kind(module) is None:
        return f"no int8 kernel for {type(module).__name__}, or for its padding"
    if not step.matches(path, module):
        return "left out by only or skip"
    return "at an edge" if path in edges and step.edges == "float" else None


def edges_of(model: nn.Module, example: Example) -> set[str]:
    """Paths of the first and last layers: with no layer before them, or none behind."""
    return _edges(trace(model, _beside(model, example)))


def _beside(model: nn.Module, example: Example) -> Example:
    """The example on the model's device."""
    device = next((p.device for p in model.parameters()), None)
    found = tuple(each.to(device) for each in (example if isinstance(example, tuple) else (example,)))
    return found if isinstance(example, tuple) else found[0]


def _edges(graph: fx.GraphModule) -> set[str]:
    def layer(node: fx.Node) -> bool:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        return isinstance(module, _ConvNd | nn.Linear)

    nodes = list(graph.graph.nodes)
    below: dict[fx.Node, bool] = {}  # whether a layer comes before
    above: dict[fx.Node, bool] = {}  # whether a layer comes behind
    for node in nodes:
        below[node] = any(below[source] or layer(source) for source in node.all_input_nodes)
    for node in reversed(nodes):
        above[node] = any(above[user] or layer(user) for user in node.users)
    return {str(node.target) for node in nodes if layer(node) and not (below[node] and above[node])}


Grids = dict[str, tuple[int, list[str]]]
Inputs = dict[str, tuple[int, dict[str, list[str]]]]


def _grids(graph: fx.GraphModule, groups: dict[str, list[str]], layers: dict[str, Any]) -> tuple[Grids, Inputs]:
    """The bits of each group of points, and the grids of few bits between an 8-bit value and its readers."""
    by_name = {node.name: node for node in graph.graph.nodes}
    grids: Grids = {}
    inputs: Inputs = {}
    owner: dict[str, str] = {}  # layer -> grid that it reads, since a layer that is called twice reads one grid
    for name, members in groups.items():
        users = [user for member in members for user in by_name[member].users]
        reads = {layers[str(u.target)]["reads"] if _is_layer(u, layers) else 8 for u in users}
        bits = next(iter(reads)) if len(reads) == 1 else 8
        grids[name] = (bits, members)
        for member in members:
            for user in by_name[member].users:
                if not _is_layer(user, layers) or layers[str(user.target)]["reads"] == bits:
                    continue
                path, few = str(user.target), layers[str(user.target)]["reads"]
                grid = owner.setdefault(path, f"{member}_{few}bits")
                readers = inputs.setdefault(grid, (few, {}))[1].setdefault(member, [])
                if path not in readers:
                    readers.append(path)
    return grids, inputs


def _is_layer(node: fx.Node, layers: dict[str, Any]) -> bool:
    return node.op == "call_module" and str(node.target) in layers
