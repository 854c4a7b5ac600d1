"""Tries a cut on copies without data: the model's own forward, or its graph with the sizes written anew.

Copies live on the "meta" device: shapes are computed, numbers are not.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tersenet.graph.calls import is_leaf
from tersenet.graph.literals import Rewrite, resize
from tersenet.graph.surgery import Cut, cut, tensor_of

Shapes = Mapping[fx.Node, tuple[int, ...]]


class _Culprit(Exception):
    """A node of the graph fails. Its name and what it said stay apart: torch rewrites the text of errors."""

    def __init__(self, name: str, said: str) -> None:
        super().__init__(said)
        self.name, self.said = name, said


def only_in_graph(model: nn.Module, kept: Cut) -> bool:
    """Whether a cut names a tensor that belongs to no module: a constant which the capture found."""
    return any(
        role.startswith("dim") and tensor_of(model, path) is None for path, roles in kept.items() for role in roles
    )


def takes_any_batch(model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether the model also runs with a batch of one more."""
    twin = _without_numbers(model)
    for module in twin.modules():
        module.training = False
    try:
        with torch.device("meta"), torch.no_grad():
            twin(*[torch.empty((len(x) + 1, *x.shape[1:]), dtype=x.dtype) for x in inputs])
    except Exception:  # noqa: BLE001 - whatever the user's forward raises
        return False
    return True


def of_model(model: nn.Module, kept: Cut, shapes: Shapes, inputs: tuple[Tensor, ...]) -> str | None:
    """What goes wrong when the model runs cut; None when every layer gives the shape that it should.

    Args:
        shapes: node of the model's graph -> the shape it should have.
    """
    if only_in_graph(model, kept):
        return "a constant in the forward would have to be cut"
    twin = _without_numbers(model)
    expected: dict[str, list[tuple[int, ...]]] = {}
    layers = dict(model.named_modules(remove_duplicate=False))
    for node, shape in shapes.items():
        if node.op == "call_module" and str(node.target) in layers and is_leaf(layers[str(node.target)]):
            expected.setdefault(str(node.target), []).append(shape)
    wrong: list[str] = []

    def check(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            want = expected[path].pop(0) if expected[path] else None
            if want is not None and tuple(output.shape) != want and not wrong:
                wrong.append(f"{path} gives {tuple(output.shape)} in place of {want}")

        return hook

    for module in twin.modules():
        module.training = False
    for path in expected:
        twin.get_submodule(path).register_forward_hook(check(path))
    try:
        cut(twin, kept)
        with torch.device("meta"), torch.no_grad():
            twin(*inputs)
    except Exception as error:  # noqa: BLE001 - whatever the user's forward raises
        return _said(error)
    missing = [path for path, rest in expected.items() if rest]
    if missing and not wrong:
        return f"{missing[0]} is not called any more"
    return wrong[0] if wrong else None


class _OnMeta(fx.Interpreter):
    """Tensors that a graph makes on a device of its own have no numbers here either."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args = tuple(torch.device("meta") if isinstance(arg, torch.device) else arg for arg in args)
        return super().call_function(target, args, {**kwargs, "device": "meta"} if "device" in kwargs else kwargs)


def of_graph(
    graph: fx.GraphModule, kept: Cut, found: Mapping[str, Rewrite], shapes: Shapes, inputs: tuple[Tensor, ...]
) -> tuple[fx.Node, str] | None:
    """(node, what it said) of the first operator that goes wrong in a cut graph; None when none does."""
    twin = _without_numbers(graph)
    cut(twin, kept)
    resize(twin, dict(found))
    twin.eval()
    wanted = {node.name: (node, shape) for node, shape in shapes.items()}
    origin = {node.name: node for node in graph.graph.nodes}

    class Checked(_OnMeta):
        def run_node(self, node: fx.Node) -> Any:
            try:
                value = super().run_node(node)
            except Exception as error:
                raise _Culprit(node.name, _said(error)) from error
            if node.name in wanted and isinstance(value, Tensor) and tuple(value.shape) != wanted[node.name][1]:
                said = f"it gives {tuple(value.shape)} in place of {wanted[node.name][1]}"
                raise _Culprit(node.name, said)
            return value

    try:
        with torch.device("meta"), torch.no_grad():
            Checked(twin).run(*inputs)
    except _Culprit as culprit:
        return origin[culprit.name], culprit.said
    return None


class _Calls(TorchDispatchMode):
    """Counts operators by name, written floats and shapes of results."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        numbers = tuple(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, float))
        sizes = tuple(tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.found[func.overloadpacket.__name__.rstrip("_"), numbers, sizes] += 1
        return result


def differs(
    model: nn.Module, graph: fx.GraphModule, kept: Cut, found: Mapping[str, Rewrite], inputs: tuple[Tensor, ...]
) -> str | None:
    """Names an operator with which the cut model computes something else than its cut graph; None when there is none.

    A forward may look at the number of channels: to decide, to scale, to split heads. Then it runs on fewer channels,
    but it is another function. What model and graph do differently before the cut does not count.
    """

    def calls(one: nn.Module, before: Callable[[Any], Any]) -> Counter[tuple[Any, ...]]:
        twin = _without_numbers(one)
        before(twin)
        for module in twin.modules():
            module.training = False
        with torch.device("meta"), torch.no_grad(), _Calls() as recorder:
            _OnMeta(twin).run(*inputs) if one is graph else twin(*inputs)
        return recorder.found

    def missing(ours: Counter[tuple[Any, ...]], wanted: Counter[tuple[Any, ...]]) -> Counter[str]:
        names: Counter[str] = Counter()
        for key, count in (wanted - ours).items():
            names[key[0]] += count
        return names

    def shrink(twin: Any) -> None:
        cut(twin, kept)
        resize(twin, dict(found))

    as_it_was = missing(calls(model, lambda twin: None), calls(graph, lambda twin: None))
    now = missing(calls(model, lambda twin: cut(twin, kept)), calls(graph, shrink))
    return next(iter(now - as_it_was), None)


def _without_numbers(model: nn.Module) -> Any:
    """A copy on the "meta" device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _said(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
