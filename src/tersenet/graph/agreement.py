"""Holds a captured graph against the model it was captured from: the same outputs, or an error that says where not.

Both run with made inputs of several batches, in evaluation mode. What has been compared once is remembered by what it
is: the graph's operators and constants, and the model's classes and settings, not the numbers of its parameters. So a
model that is captured again while it is compressed costs nothing more.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tersenet.bricks.evaluating import evaluating
from tersenet.errors import TraceError
from tersenet.graph.structure import structure

# Shares of the largest output that summing in another order may change. A capture only reorders where it joins
# operators; anything that is forgotten or added is far above.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_seen: set[str] = set()
# Inside `compared_once`: models, graphs and numbers that were compared and found alike.
_right: ContextVar[set[str] | None] = ContextVar("_right", default=None)


@contextlib.contextmanager
def compared_once() -> Iterator[None]:
    """Inside, a graph that was captured before is compared with a model once for each set of numbers.

    Only where nothing but our own code and the model's forward runs in between: what a forward reads from elsewhere,
    such as a global, may have changed with other code. To read all numbers takes a fraction of the time of a forward.
    """
    token = _right.set(set())
    try:
        yield
    finally:
        _right.reset(token)


def check(model: nn.Module, graph: fx.GraphModule, inputs: Sequence[Tensor], open_batch: bool) -> None:
    """Compares all outputs, with two inputs, and where the batch is open with other batches too.

    Args:
        inputs: each (N, ...), as they were captured.
    Raises:
        TraceError: when an output differs; names the first operator that does, with its line.
    """
    if any(tensor.device.type == "meta" for tensor in (*model.parameters(), *model.buffers(), *inputs)):
        return  # there are no numbers to compare
    key = _fingerprint(model, graph, inputs)
    if key in _seen:
        return
    for batch, made in _made_inputs(inputs, open_batch):
        _compare(model, graph, made, batch)
    _seen.add(key)


def still_right(model: nn.Module, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> bool:
    """Whether a graph that was captured from another model of the same structure computes what this one does."""
    if any(tensor.device.type == "meta" for tensor in (*model.parameters(), *model.buffers(), *inputs)):
        return True
    known = _right.get()
    key = "" if known is None else _fingerprint(model, graph, inputs) + _numbers_of(model, graph, inputs)
    if known is not None and key in known:
        return True
    try:
        wanted, found = (tree_leaves(run(each, inputs)) for each in (model, graph))
    except Exception:  # noqa: BLE001 - a new capture will say what is wrong
        return False
    right = len(wanted) == len(found) and all(map(_equal, wanted, found))
    if right and known is not None:
        known.add(key)
    return right


def _compare(model: nn.Module, graph: fx.GraphModule, inputs: Sequence[Tensor], batch: int | None) -> None:
    try:
        wanted = tree_leaves(run(model, inputs))
    except Exception as error:
        if batch is None:
            raise TraceError(f"{_name(model)} does not run on its example: {_said(error)}") from error
        return  # the model itself takes no such batch
    try:
        found = tree_leaves(run(graph, inputs))
        same = len(wanted) == len(found) and all(map(_equal, wanted, found))
        reason = "gives other outputs than its captured graph"
    except Exception as error:  # noqa: BLE001 - any operator may refuse
        same, reason = False, f"runs, and its captured graph does not ({_said(error)})"
    if same:
        return
    again = tree_leaves(run(model, inputs))
    if not all(map(_equal, wanted, again)):
        raise TraceError(
            f"{_name(model)} gives other outputs when it is called again with the same input, so nothing can be held "
            "against it; take what it keeps between calls out of the forward"
        )
    where = _first_difference(model, graph, inputs)
    size = f" with a batch of {batch}" if batch is not None else ""
    advice = "; take sizes from x.shape, and no decision from them" if batch is not None else ""
    raise TraceError(f"{_name(model)} {reason}{size}{where}{advice}; nothing was written")


def run(model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """One call in evaluation mode, with the same random numbers each time; buffers and modes are left as they were."""
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers() if buffer.numel() <= 1 << 16]
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        outputs = model(*[x.clone() for x in inputs])
        for buffer, version, value in buffers:
            if buffer._version != version:
                buffer.copy_(value)
        return outputs


def _equal(wanted: Any, found: Any) -> bool:
    if not isinstance(wanted, Tensor) or not isinstance(found, Tensor):
        return isinstance(wanted, Tensor) == isinstance(found, Tensor)  # sizes and names are no outputs to compare
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return False
    if wanted.numel() == 0 or torch.equal(wanted, found):
        return True
    if not wanted.is_floating_point():
        return not wanted.is_complex() and wanted.dtype != torch.bool and bool((wanted != found).double().mean() < 1e-3)
    if not torch.equal(torch.isfinite(wanted), torch.isfinite(found)):
        return False
    limit = _TOLERANCE.get(wanted.dtype, 1e-4)
    wanted, found = (torch.nan_to_num(value.double(), 0.0, 0.0, 0.0) for value in (wanted, found))
    return float((wanted - found).abs().max()) <= limit * max(float(wanted.abs().max()), 1e-12)


def _made_inputs(inputs: Sequence[Tensor], open_batch: bool) -> Iterator[tuple[int | None, list[Tensor]]]:
    """(batch, inputs): the example, then other numbers of its kind; None is the batch that was captured."""
    generator = torch.Generator().manual_seed(0)
    first = [x if _varies(x) else _other(x, generator) for x in inputs]
    if not open_batch:
        yield None, first
        yield None, [_other(x, generator) for x in first]
        return
    yield None, [x[:2] for x in first]
    for size in (3, 1):
        yield size, [_other(torch.cat([x[:1]] * size), generator) for x in first]


def _varies(x: Tensor) -> bool:
    return x.numel() > 0 and (not x.is_floating_point() or bool((x != x.flatten()[0]).any()))


def _other(x: Tensor, generator: torch.Generator) -> Tensor:
    """Other numbers of the same kind: the same ones in other places, with noise where they are no whole numbers."""
    order = torch.randperm(x.numel(), generator=generator)
    moved = x.flatten()[order.to(x.device)].reshape(x.shape)
    if not x.is_floating_point():
        return moved
    noise = torch.randn(x.shape, generator=generator).to(x)
    spread = float(x.double().std()) if _varies(x) else 1.0
    return moved + noise * (spread if spread > 0 else 1.0) * (0.1 if _varies(x) else 1.0)


# --- where --------------------------------------------------------------------------------------------------------


class _Values(TorchDispatchMode):
    """Marks of every tensor that a forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.marks.update(_mark(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def _mark(value: Tensor) -> tuple[Any, ...]:
    numbers = torch.nan_to_num(value.detach().double(), 0.0, 0.0, 0.0)
    sums = [float(f"{float(total):.5g}") for total in (numbers.sum(), numbers.abs().sum())]
    return (value.numel(), value.dtype, *sums)


def _first_difference(model: nn.Module, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> str:
    """ ", first at ..." for the first operator of the graph whose value the model never has; "" when none is found."""
    with contextlib.suppress(Exception), _Values() as values:
        run(model, inputs)
    marks = values.marks
    found: list[fx.Node] = []

    class Looking(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            try:
                value = super().run_node(node)
            except Exception:
                found.append(node)
                raise
            made = node.op in ("call_function", "call_module") and isinstance(value, Tensor)
            if made and not found and _mark(value) not in marks and _numbers(value):
                found.append(node)
            return value

    with evaluating(graph), torch.no_grad(), torch.random.fork_rng(devices=()), contextlib.suppress(Exception):
        torch.default_generator.manual_seed(0)
        Looking(graph).run(*[x.clone() for x in inputs])
    if not found:
        return ""
    node = found[0]
    path = f" of {node.meta['path']}" if node.meta.get("path") else ""
    line = f" (line: {node.meta['line']})" if node.meta.get("line") else ""
    return f", first at {node.target}{path}{line}"


def _numbers(value: Tensor) -> bool:
    return value.is_floating_point()


# --- what has been seen -------------------------------------------------------------------------------------------


def _fingerprint(model: nn.Module, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> str:
    """What decides whether a graph computes what a model does, without the numbers of parameters and buffers."""
    said = [structure(model, inputs)]
    for node in graph.graph.nodes:
        said.append(f"{node.op} {node.target} {node.args} {node.kwargs}")
        if node.op == "call_module":
            layer = graph.get_submodule(str(node.target))
            said.append(f"{type(layer).__qualname__} {layer.extra_repr()}")
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def _numbers_of(model: nn.Module, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> str:
    """A digest of the numbers of a model, a graph and inputs, and of which of them are one."""
    held = [
        torch.fx.graph_module._get_attr(graph, str(node.target)) for node in graph.graph.nodes if node.op == "get_attr"
    ]
    digest = hashlib.blake2b()
    places: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers(), *graph.parameters(), *graph.buffers(), *held, *inputs):
        if id(tensor) in places or not isinstance(tensor, Tensor):
            digest.update(repr(places.get(id(tensor))).encode())
            continue
        places[id(tensor)] = len(places)
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _name(model: nn.Module) -> str:
    return f"the forward of {type(model).__name__}"


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
