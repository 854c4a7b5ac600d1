"""A traced graph as plain JSON, and back: what makes a .terse file load without the model's class.

`tersenet.graph.trace.trace` gives a graph of layers (torch.nn, bricks) and aten operators. Layers become their type's
name and constructor arguments; operators become names of an allow-list (`operators`). Reading never
looks a name up anywhere else, so a file cannot name a class or a function of its own choosing. torch.fx turns graphs
into Python source, so every path and placeholder is held to letters, digits and underscores before it gets there.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersenet.deploy.layer_table import layer_from_json, layer_to_json, want
from tersenet.deploy.operators import ATEN, DTYPES, MEMORY_FORMATS, PYTHON
from tersenet.errors import ExportError

_PATH = re.compile(r"[A-Za-z0-9_]{1,200}(\.[A-Za-z0-9_]{1,200}){0,60}")
# What a path may not hide: at its start an attribute of the graph module, further in one of any module.
_TAKEN = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))
_TAKEN_INSIDE = frozenset(dir(nn.Module()))
_NOT_INPUTS = frozenset(
    ("self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree")
)  # fx's own globals
_MAX_NODES = 1_000_000
_MAX_DEPTH = 8


def to_json(graph: fx.GraphModule) -> dict[str, Any]:
    """The graph as JSON; its numbers are its state dict.

    Raises:
        ExportError: for a layer or an operator that a file cannot hold; names it and says what to do.
    """
    index = {node: i for i, node in enumerate(graph.graph.nodes)}
    layers: dict[str, list[Any]] = {}
    attributes: dict[str, str] = {}
    first_path: dict[nn.Module, str] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and node.target not in layers:
            layer = graph.get_submodule(node.target)
            if layer in first_path:  # one layer under two names stays one layer
                layers[node.target] = ["same", {"as": first_path[layer]}]
            else:
                first_path[layer] = node.target
                layers[node.target] = layer_to_json(node.target, layer)
        elif node.op == "get_attr":
            attributes[node.target] = _attribute_kind(graph, node.target)
    return {
        "nodes": [_node_to_json(node, index) for node in graph.graph.nodes],
        "layers": [[path, *entry] for path, entry in layers.items()],
        "attributes": [[path, kind] for path, kind in attributes.items()],
        "tied": _tied(graph),
        "frozen": [path for path, parameter in graph.named_parameters() if not parameter.requires_grad],
    }


def from_json(data: Any, tensors: dict[str, Tensor]) -> fx.GraphModule:
    """The inverse of `to_json`: a module in evaluation mode that owns `tensors` (on the meta device, if these are).

    Raises:
        ValueError: when the JSON is not of this form, or does not fit the tensors; says why.
    """
    want(isinstance(data, dict) and set(data) == {"nodes", "layers", "attributes", "tied", "frozen"}, "unknown fields")
    want(all(isinstance(part, list) for part in data.values()), "a field is no list")
    root: dict[str, Any] = {}
    for entry in data["layers"]:
        want(isinstance(entry, list) and len(entry) == 3, "a layer has not its three fields")
        path, kind, config = entry
        _check_path(path, root)
        root[path] = layer_from_json(kind, config, root)
    for entry in data["attributes"]:
        want(isinstance(entry, list) and len(entry) == 2, "an attribute has not its two fields")
        path, kind = entry
        _check_path(path, root)
        want(path in tensors, f"there is no tensor for {path}")
        want(kind in ("parameter", "buffer"), f"{path} is neither a parameter nor a buffer")
        empty = torch.empty_like(tensors[path], device="meta")
        want(kind == "buffer" or empty.is_floating_point(), f"parameter {path} is not of floating point")
        root[path] = nn.Parameter(empty) if kind == "parameter" else empty
    _check_nesting(root)
    graph = _graph_from_json(data["nodes"], root)
    try:
        module = fx.GraphModule(root, graph, class_name="Graph")
    except Exception as error:  # fx compiles the graph as Python source, which can be too long or too deep for it
        raise ValueError(f"the graph cannot be built: {str(error)[:200]}") from error
    _fill(module, tensors)
    _tie(module, data["tied"])
    for path in data["frozen"]:
        _parameter(module, path).requires_grad_(False)
    return module.eval()


# ----------------------------------------------------------------------------------------------------------- nodes


def _node_to_json(node: fx.Node, index: dict[fx.Node, int]) -> list[Any]:
    """[op, target, args] or [op, target, args, kwargs]; a node is known by its place in the list."""
    target = node.target
    if node.op == "call_function":
        names = {function: name for name, function in PYTHON.items()}
        name = names.get(target, str(target)) if callable(target) else str(target)
        known = isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" and name in ATEN
        if not known and target not in PYTHON.values():
            where = node.meta.get("line") or node.meta.get("path") or "the model"
            raise ExportError(
                f"operator {name} (in {where}) is not one that a .terse file may hold; write it with others, or export "
                "to .onnx or .pt2"
            )
        target = name
    entry = [node.op, str(target), _value_to_json(list(node.args), index)]
    return [*entry, {k: _value_to_json(v, index) for k, v in node.kwargs.items()}] if node.kwargs else entry


def _graph_from_json(entries: list[Any], root: dict[str, Any]) -> fx.Graph:
    want(0 < len(entries) <= _MAX_NODES, "the graph is empty or has too many nodes")
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    inputs: set[str] = set()
    for i, entry in enumerate(entries):
        want(isinstance(entry, list) and len(entry) in (3, 4), "a node has not its fields")
        op, target, args = entry[:3]
        kwargs = entry[3] if len(entry) == 4 else {}
        want(isinstance(op, str) and isinstance(target, str) and isinstance(args, list), "a node is malformed")
        want(isinstance(kwargs, dict) and all(map(_identifier, kwargs)), "a node's keywords are malformed")
        args = tuple(_value_from_json(arg, nodes) for arg in args)
        kwargs = {key: _value_from_json(value, nodes) for key, value in kwargs.items()}
        want((op == "output") == (i == len(entries) - 1), "the output is not the last node, and only that")
        if op == "call_function":
            nodes.append(graph.call_function(_function(target, args, kwargs), args, kwargs))
        elif op == "call_module":
            want(isinstance(root.get(target), nn.Module), "a node calls a layer that is not there")
            nodes.append(graph.call_module(target, args, kwargs))
        elif op == "get_attr":
            want(isinstance(root.get(target), Tensor) and not args and not kwargs, "a node reads what is not there")
            nodes.append(graph.get_attr(target))
        elif op == "placeholder":
            want(
                _identifier(target) and target not in inputs | _NOT_INPUTS,
                "an input's name is malformed or comes twice",
            )
            want(not args and not kwargs, "an input has arguments")
            inputs.add(target)
            nodes.append(graph.placeholder(target))
        else:
            want(op == "output" and len(args) == 1 and not kwargs, f"there is no node of kind {op!r}")
            graph.output(args[0])
    return graph


def _function(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The operator of a name on the allow-list."""
    if name in PYTHON:
        # Arithmetic of sizes, and picking from a list of tensors: numbers and nodes only, so "a" * 10**9 is no graph.
        want(not kwargs and all(isinstance(arg, fx.Node | int | float) for arg in args), f"{name} takes numbers only")
        want(any(isinstance(arg, fx.Node) for arg in args), f"{name} has no input")
        return PYTHON[name]
    want(name in ATEN, f"operator {name[:100]!r} is not on the list of allowed ones")
    _, packet, overload = name.split(".")
    found: Any = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    want(found is not None, f"this version of PyTorch has no {name}; update it")
    return found


def _value_to_json(value: Any, index: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return {"node": index[value]}
    if isinstance(value, list | tuple):
        return [_value_to_json(item, index) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    for kind, names in (("dtype", DTYPES), ("memory_format", MEMORY_FORMATS)):
        for name, known in names.items():
            if value is known:
                return {kind: name}
    if isinstance(value, torch.device) and value.type == "cpu":
        return {"device": "cpu"}
    if value is torch.strided:
        return {"layout": "strided"}
    raise ExportError(
        f"a .terse file cannot hold the argument {value!r} of an operator; export to .onnx or .pt2 instead"
    )


def _value_from_json(value: Any, nodes: list[fx.Node], depth: int = 0) -> Any:
    if isinstance(value, list):
        want(depth < _MAX_DEPTH, "an argument is nested too deeply")
        return [_value_from_json(item, nodes, depth + 1) for item in value]
    if not isinstance(value, dict):
        want(not isinstance(value, int) or abs(value) < 2**63, "a number is too large")
        return value
    want(len(value) == 1, "an argument is malformed")
    ((kind, name),) = value.items()
    if kind == "node":
        want(type(name) is int and 0 <= name < len(nodes), "an argument is a node that does not come before")
        return nodes[name]
    want(isinstance(name, str), "an argument is malformed")
    choices: dict[str, dict[str, Any]] = {
        "dtype": DTYPES,
        "memory_format": MEMORY_FORMATS,
        "float": {str(number): number for number in (math.inf, -math.inf, math.nan)},
        "device": {"cpu": torch.device("cpu")},
        "layout": {"strided": torch.strided},
    }
    want(kind in choices and name in choices[kind], "an argument is of a kind that is not known")
    return choices[kind][name]


# --------------------------------------------------------------------------------------------------------- numbers


def _attribute_kind(graph: fx.GraphModule, path: str) -> str:
    owner, _, leaf = path.rpartition(".")
    value = getattr(graph.get_submodule(owner), leaf)
    if not isinstance(value, Tensor):
        raise ExportError(
            f"{path} is a {type(value).__name__}, and a .terse file holds tensors; the forward probably has control "
            "flow (torch.cond) or calls inside of no_grad; take them out"
        )
    return "parameter" if isinstance(value, nn.Parameter) else "buffer"


def _named(graph: nn.Module) -> list[tuple[str, Tensor]]:
    return [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]


def _tied(graph: nn.Module) -> list[list[str]]:
    """Groups of names that are one tensor."""
    groups: dict[int, list[str]] = {}
    for name, tensor in _named(graph):
        groups.setdefault(id(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    expected = module.state_dict()
    missing, unknown = set(expected) - set(tensors), set(tensors) - set(expected)
    want(not missing and not unknown, f"tensors are missing or left over: {sorted(missing | unknown)[:3]}")
    for name, value in expected.items():
        want(
            value.shape == tensors[name].shape,
            f"{name} is {list(tensors[name].shape)}, its layer needs {list(value.shape)}",
        )
        same_kind = value.is_floating_point() == tensors[name].is_floating_point()
        want(same_kind, f"{name} is of {tensors[name].dtype}, its layer needs {value.dtype}")
    module.load_state_dict(tensors, assign=True)
    left = [name for name, tensor in _named(module) if tensor.is_meta and name not in tensors]
    want(not left, f"the file has no numbers for {left[:3]}")


def _tie(module: nn.Module, groups: list[Any]) -> None:
    known = dict(_named(module))
    for names in groups:
        want(isinstance(names, list) and len(names) > 1, "a group of tied tensors is malformed")
        want(all(isinstance(name, str) and name in known for name in names), "a tied tensor is not there")
        first = known[names[0]]
        for name in names[1:]:
            value = known[name]
            want(
                type(value) is type(first) and value.shape == first.shape and value.dtype == first.dtype,
                f"{name} cannot be tied",
            )
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, first)


def _parameter(module: nn.Module, path: Any) -> nn.Parameter:
    want(
        isinstance(path, str) and path in dict(module.named_parameters(remove_duplicate=False)),
        "a frozen tensor is not there",
    )
    return module.get_parameter(path)


def _check_path(path: Any, taken: dict[str, Any]) -> None:
    """A path of plain names, which cannot hide what a module has of its own (`forward`, `train`, `_parameters`)."""
    want(
        isinstance(path, str) and _PATH.fullmatch(path) is not None and path not in taken,
        "a path is malformed or comes twice",
    )
    first, *others = path.split(".")
    want(first not in _TAKEN and not _TAKEN_INSIDE & set(others), f"path {path} has the name of something else")


def _check_nesting(root: dict[str, Any]) -> None:
    """Nothing lies inside a tensor; inside a layer lie only tensors that it has."""
    for path, value in root.items():
        parts = path.split(".")
        for i in range(1, len(parts)):
            outer = root.get(".".join(parts[:i]))
            want(not isinstance(outer, Tensor), f"{path} lies inside of a tensor")
            if isinstance(outer, nn.Module):
                kinds = {**outer._parameters, **outer._buffers}
                inside = i == len(parts) - 1 and isinstance(value, Tensor) and kinds.get(parts[-1]) is not None
                want(inside, f"{path} lies inside of a layer")
                want((parts[-1] in outer._parameters) == isinstance(value, nn.Parameter), f"{path} is of another kind")


def _identifier(name: Any) -> bool:
    return (
        isinstance(name, str)
        and len(name) <= 200
        and name.isascii()
        and name.isidentifier()
        and not keyword.iskeyword(name)
    )
