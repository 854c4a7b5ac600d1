"""The structure of a model's outputs: tuples, lists and dicts of tensors, as plain JSON and back.

As JSON a tensor is its place in the flattened order, a container {"tuple": [...]}, {"list": [...]} or
{"dict": [[key, value], ...]}, and what is no tensor {"value": None, a number or a string}. Files keep it, so that they
give what the model gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind
from torch.utils import _pytree as pytree

from tersenet.errors import TraceError

OUTPUTS = "tersenet.outputs"  # the name of this JSON among what a file says about itself
_MAX_DEPTH = 16
_PLAIN = (bool, int, float, str, type(None))


def nested(leaves: Sequence[Any], spec: pytree.TreeSpec, name: str) -> Any:
    """Flat outputs in the containers that a model returns them in; ordered dicts become dicts.

    Args:
        name: of the model, for what is said.
    Raises:
        TraceError: on a container that files cannot keep.
    """
    _check(spec, name)
    return _without_subclasses(pytree.tree_unflatten(leaves, spec))


def _check(spec: pytree.TreeSpec, name: str) -> None:
    kind = None if spec.is_leaf() else spec.type
    if kind is not None and kind.__name__ not in ("tuple", "list", "dict", "OrderedDict"):
        raise TraceError(
            f"the outputs of {name} are in a {kind.__name__}, which no file can keep; return tensors, or a tuple, list "
            "or dict of them"
        )
    for child in spec.children():
        _check(child, name)


def _without_subclasses(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_subclasses(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_subclasses(each) for each in value]
    return tuple(map(_without_subclasses, value)) if isinstance(value, tuple) else value


def describe(value: Any) -> tuple[list[Any], Any]:
    """(what is no plain value, in flattened order; the structure as JSON) of nested outputs."""
    leaves: list[Any] = []

    def walk(each: Any) -> Any:
        if isinstance(each, dict):
            return {"dict": [[key, walk(inner)] for key, inner in each.items()]}
        if isinstance(each, tuple | list):
            return {"tuple" if isinstance(each, tuple) else "list": [walk(inner) for inner in each]}
        if isinstance(each, _PLAIN):
            return {"value": each}
        leaves.append(each)
        return len(leaves) - 1

    structure = walk(value)
    return leaves, structure


def in_plain_containers(program: ExportedProgram) -> ExportedProgram:
    """The program, changed to return dicts and lists where a captured graph gave torch.fx's own kinds of these."""
    spec = program.call_spec.out_spec
    if spec is not None and "immutable" in str(spec):
        plain = _without_subclasses(pytree.tree_unflatten(range(spec.num_leaves), spec))
        program.module_call_graph[0].signature.out_spec = pytree.tree_structure(plain)
    return program


def structure_of(program: ExportedProgram) -> Any:
    """The structure of what a captured program returns. Raises TraceError as `nested`."""
    args = [spec.arg for spec in program.graph_signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    leaves = [arg.value if isinstance(arg, ConstantArgument) else arg for arg in args]
    assert program.call_spec.out_spec is not None
    return describe(nested(leaves, program.call_spec.out_spec, "the program"))[1]


def output_of(graph: fx.GraphModule) -> fx.Node:
    """The output node of a graph; `describe(output_of(graph).args[0])` is what it returns, and how."""
    return next(iter(reversed(graph.graph.nodes)))


def return_flat(graph: fx.GraphModule) -> Any:
    """Makes a graph return its outputs as a flat list, or its only tensor; the structure that they had."""
    output = output_of(graph)
    leaves, structure = describe(output.args[0])
    output.args = (leaves[0] if structure == 0 else leaves,)
    graph.recompile()
    return structure


def return_nested(graph: fx.GraphModule, structure: Any) -> None:
    """The inverse of `return_flat`. Raises ValueError where the structure does not fit the graph."""
    output = output_of(graph)
    flat = output.args[0]
    output.args = (assemble(structure, flat if isinstance(flat, list | tuple) else [flat]),)
    graph.recompile()


def assemble(structure: Any, leaves: Sequence[Any]) -> Any:
    """The inverse of `describe`.

    Raises:
        ValueError: when the JSON is not of this form, or does not use each leaf.
    """
    used: set[int] = set()

    def walk(each: Any, depth: int) -> Any:
        if type(each) is int and 0 <= each < len(leaves):
            used.add(each)
            return leaves[each]
        if not isinstance(each, dict) or len(each) != 1 or depth > _MAX_DEPTH:
            raise ValueError("the structure of its outputs is malformed")
        ((kind, inner),) = each.items()
        if kind == "value" and isinstance(inner, _PLAIN):
            return inner
        if kind in ("tuple", "list") and isinstance(inner, list):
            return (tuple if kind == "tuple" else list)(walk(one, depth + 1) for one in inner)
        pairs = kind == "dict" and isinstance(inner, list)
        if pairs and all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], _PLAIN) for pair in inner):
            return {key: walk(one, depth + 1) for key, one in inner}
        raise ValueError("the structure of its outputs is malformed")

    value = walk(structure, 0)
    if used != set(range(len(leaves))):
        raise ValueError("the structure of its outputs does not fit their number")
    return value


def names(structure: Any) -> list[str]:
    """A name per output in flattened order: by keys where it stands in a dict ("logits", "aux.0"), else "output",
    "output_1" and so on."""
    paths: list[tuple[Any, ...]] = []

    def walk(each: Any, path: tuple[Any, ...]) -> None:
        if isinstance(each, int):
            paths.append(path)
            return
        ((kind, inner),) = each.items()
        if kind != "value":
            for index, one in enumerate(inner):
                walk(one[1] if kind == "dict" else one, (*path, one[0] if kind == "dict" else index))

    walk(structure, ())
    numbered = ["output" if i == 0 else f"output_{i}" for i in range(len(paths))]
    keyed = [".".join(map(str, path)) if any(isinstance(key, str) for key in path) else "" for path in paths]
    found = [own or number for own, number in zip(keyed, numbered, strict=True)]
    return found if len(set(found)) == len(found) else numbered
