"""Which attributes of a model's modules are read by other code than their own: `F.linear(x, self.embed.weight)`.

Whoever puts another module in a module's place, or changes its numbers and makes up for it in its own output, may do so
only where nobody else reads them. The forward is run once and watched; what it only asks a tensor for, such as
`x.to(self.fc.weight.dtype)`, counts too, since what takes the layer's place may keep its weight in another type.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from tersenet.bricks.evaluating import evaluating
from tersenet.graph.capture import Example, attributes_kept

TENSORS = ("weight", "bias")  # of convolutions and linear layers: what those that take their place keep differently


@dataclass(frozen=True)
class Read:
    """One attribute of one module that is read while the module itself is not at work.

    Args:
        path: of the module; all of its paths where it has several.
        name: of the attribute.
        reader: path of the module whose forward reads it, "" for the model.
        kind: name of that module's type.
    """

    path: str
    name: str
    reader: str
    kind: str

    @property
    def why(self) -> str:
        """As it ends "these layers were left alone: they ..."."""
        where = f"in the forward of {self.kind}" if self.reader else "in the model's own forward"
        return f"are read elsewhere, too: their {self.name} {where}"


def outside_reads(model: nn.Module, example: Example) -> list[Read]:
    """What is read from outside, each once, in the order of the forward; nothing where the forward does not run.

    Args:
        example: (N, ...), or a tuple of all inputs.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = [each.to(device) for each in (example if isinstance(example, tuple) else (example,))]
    found: dict[Read, None] = {}
    with (
        evaluating(model), attributes_kept(model, False), _buffers_kept(model), _by_parts(), _watched(model, found),
        torch.no_grad(), torch.random.fork_rng(devices=[]), contextlib.suppress(Exception),
    ):  # fmt: skip
        model(*inputs)  # whatever a forward raises, another run of it will say
    return list(found)


def used_outside(model: nn.Module, example: Example, names: Collection[str] | None = TENSORS) -> dict[str, str]:
    """Path of a module -> why it is left alone, for modules of which something is read from outside.

    Args:
        names: the attributes that matter; None for all of them.
    """
    return by_path(outside_reads(model, example), names)


def by_path(reads: Iterable[Read], names: Collection[str] | None = None) -> dict[str, str]:
    """`used_outside`, of reads that are known."""
    found: dict[str, str] = {}
    for read in reads:
        if names is None or read.name in names:
            found.setdefault(read.path, read.why)
    return found


@contextlib.contextmanager
def _by_parts() -> Iterator[None]:
    """torch's transformer layers call their parts, and do not read their numbers for one fused operator."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Some forwards count or average in their buffers."""
    places = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    writable = [buffer for buffer in model.buffers() if not buffer.is_inference()]  # the others torch keeps itself
    was = [(buffer, buffer.clone(), buffer._version) for buffer in writable]
    try:
        yield
    finally:
        for now, before in places:
            now.update(before)
        for buffer, numbers, version in was:
            if buffer._version != version:
                buffer.copy_(numbers)


@contextlib.contextmanager
def _watched(model: nn.Module, found: dict[Read, None]) -> Iterator[None]:
    """Modules tell who reads them: each is of a class of its own for a while, derived from its own."""
    at_work: list[nn.Module] = []
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    first = {key: same[0] for key, same in paths.items()}
    # What attached parts compute, such as masks, is asked for where the layer's tensor is read: not a reader itself.
    parts = {key for key, same in paths.items() if "parametrizations" in same[0].split(".")}
    kinds = {id(module): type(module) for module in model.modules()}

    def note(module: nn.Module, name: str) -> None:
        if name.startswith("__") or name == "training" or not at_work or any(one is module for one in at_work):
            return
        reader = next((one for one in reversed(at_work) if id(one) not in parts), at_work[0])
        if id(module) in parts or id(module) not in kinds:
            return
        for path in paths[id(module)]:
            found.setdefault(Read(path, name, first[id(reader)], kinds[id(reader)].__name__))

    was: list[tuple[nn.Module, Any]] = []
    try:
        for module in model.modules():
            kind = type(module)
            with contextlib.suppress(TypeError, AttributeError):  # of a layout of its own, such as a scripted module
                module.__class__ = _telling(kind, note, at_work)
                was.append((module, kind))
        yield
    finally:
        for module, kind in was:
            module.__class__ = kind


def _telling(kind: Any, note: Any, at_work: list[nn.Module]) -> Any:
    """A class like `kind` whose modules call `note` whenever an attribute is read, and are at work while called."""

    def working(method: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            at_work.append(self)
            try:
                return method(self, *args, **kwargs)
            finally:
                at_work.pop()

        return call

    def read(self: Any, name: str) -> Any:
        note(self, name)
        return kind.__getattribute__(self, name)

    more = {"__call__": working(kind.__call__), "forward": working(kind.forward), "__getattribute__": read}
    return type(kind.__name__, (kind,), {**more, "__module__": kind.__module__})


# --- graphs --------------------------------------------------------------------------------------------------------


def read_by_graph(graph: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Path of a layer of a graph -> the nodes that read its numbers beside its calls."""
    layers = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    found: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            parts = str(node.target).split(".")
            for end in range(1, len(parts)):
                if (path := ".".join(parts[:end])) in layers:
                    found.setdefault(path, []).append(node)
    return found


def keep_reads(graph: fx.GraphModule, copies: bool = False) -> None:
    """What a graph reads of its layers' numbers becomes its own, in place: layers may then be exchanged or changed.

    Args:
        copies: whether it is to stay as it is, also where a layer's numbers are written to; else it goes on learning
            with the layer.
    """
    for _path, nodes in read_by_graph(graph).items():
        for node in nodes:
            value: Any = graph
            for part in str(node.target).split("."):
                value = getattr(value, part)
            name = next(n for n in _names(str(node.target).replace(".", "_")) if not hasattr(graph, n))
            value = value.detach().clone().requires_grad_(value.requires_grad) if copies else value
            if isinstance(value, nn.Parameter) or (copies and value.requires_grad):
                graph.register_parameter(name, value if isinstance(value, nn.Parameter) else nn.Parameter(value))
            else:
                graph.register_buffer(name, value)
            node.target = name
    graph.recompile()


def _names(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{i}" for i in itertools.count(1))
