"""The residual blocks of a model that can be left out whole: which they are, why others are not, and the drop itself.

A block is a submodule x -> act(x + f(x)), with or without the activation, that the model calls once, with one tensor,
for one tensor of the same shape, and of which nothing inside is read outside. Without f it computes act(x), so the drop
puts the activation, or an identity where x already lies within its range, in the place of the submodule (He et al.,
arXiv:1512.03385; that single blocks can go: Veit et al., arXiv:1605.06431).

Which submodule is the block: of submodules that hold the same operators the innermost, of blocks within a branch of
another block the outermost, of a stage and its blocks the blocks. Graphs without submodules (a traced model, an
exported program) have none of these and are not served.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersenet.errors import SurgeryError
from tersenet.graph.calls import is_leaf
from tersenet.graph.outside_reads import Read, outside_reads
from tersenet.graph.points import clip_bounds
from tersenet.graph.trace import Example, trace

aten = torch.ops.aten

Range = tuple[float, float]
# The path of the activation inside of the block, or the torch.nn class and its arguments; None is an identity.
Activation = str | list[Any] | None

_ADDS = {aten.add.Tensor, aten.add_.Tensor}
_EVERYTHING: Range = (-math.inf, math.inf)
_ACTIVATION_LAYERS = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Hardsigmoid,
)  # fmt: skip
_ACTIVATIONS = {
    "relu": "ReLU", "relu6": "ReLU6", "hardtanh": "Hardtanh", "leaky_relu": "LeakyReLU", "gelu": "GELU",
    "silu": "SiLU", "mish": "Mish", "hardswish": "Hardswish", "tanh": "Tanh", "sigmoid": "Sigmoid",
    "hardsigmoid": "Hardsigmoid",
}  # fmt: skip
"""aten operator -> the torch.nn class that takes the same arguments in the same order."""
_SAME_RANGE = {
    aten.max_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim, aten.flatten.using_ints,
    aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int, aten.contiguous.default,
    aten.clone.default, aten.slice.Tensor,
}  # fmt: skip
_SAME_RANGE_LAYERS = (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Identity)
_UNIT_RANGE = {aten.sigmoid.default, aten.hardsigmoid.default, aten.softmax.int}


@dataclass(frozen=True)
class Blocks:
    """What was found in a model, in the order of the forward.

    Args:
        found: path of a block that can be dropped -> the activation that then stays.
        refused: path of any other submodule -> why it cannot be dropped.
    """

    found: dict[str, Activation]
    refused: dict[str, str]


def residual_blocks(model: nn.Module, example: Example) -> Blocks:
    """Finds the blocks that can be dropped. Traces the model and runs it once, in evaluation mode.

    Args:
        example: (N, ...), an input of the model, or a tuple of all of them.
    Raises:
        TraceError: when the forward cannot be captured.
    """
    graph = trace(model, example)
    calls = _calls(model, example)
    ranges = _ranges(graph)
    regions: dict[str, _Region] = {}
    refused: dict[str, str] = {}
    outside = outside_reads(model, example)
    for path, module in model.named_modules(remove_duplicate=False):
        if not path:
            refused[path] = "it is the whole model"
        elif is_leaf(module):
            refused[path] = f"it is a single layer ({type(module).__name__})"
        elif said := calls.get(id(module), "it is never called as a whole"):
            refused[path] = said
        else:
            region = _Region.of(graph, path)
            if isinstance(region, _Region):
                region = next((_used(path, read) for read in outside if _reaches_into(read, path)), region)
            if isinstance(region, str):
                refused[path] = region
            else:
                regions[path] = region
    _choose(regions, refused)
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    paths = sorted(regions, key=lambda path: order[regions[path].output])
    return Blocks({path: _activation(graph, regions[path], ranges) for path in paths}, refused)


def drop(model: nn.Module, blocks: Mapping[str, Activation]) -> nn.Module:
    """Leaves blocks out, in place.

    Args:
        blocks: path -> the activation that stays, as in `Blocks.found`.
    Raises:
        SurgeryError: when the model has no such block; it is then as it was.
    """
    modules = dict(model.named_modules())
    swaps: dict[str, nn.Module] = {}
    for path, activation in blocks.items():
        if not path or path not in modules or is_leaf(modules[path]):
            raise SurgeryError(f"there is no block {path!r} to drop; the plan is another model's, make a new one")
        if isinstance(activation, str):
            if activation not in modules:
                raise SurgeryError(f"block {path} has no activation {activation!r}; the plan is another model's")
            swaps[path] = copy.deepcopy(modules[activation])
        else:
            swaps[path] = getattr(nn, activation[0])(*activation[1:]) if activation else nn.Identity()
        if hasattr(swaps[path], "inplace"):
            setattr(swaps[path], "inplace", False)  # noqa: B010 - what the block read may be read elsewhere too
    for path, module in swaps.items():
        module.train(modules[path].training)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
    return model


def _reaches_into(read: Read, path: str) -> bool:
    """Whether other code than a block's own reads of the block, or of what is in it."""
    return f"{read.path}.".startswith(f"{path}.") and not f"{read.reader}.".startswith(f"{path}.")


def _used(path: str, read: Read) -> str:
    name = f"{read.path}.{read.name}".removeprefix(f"{path}.")
    return f"its {name} is used outside of it"


def _calls(model: nn.Module, example: Example) -> dict[int, str]:
    """id of a module that was called -> why its calls forbid to replace it; empty where nothing does."""
    seen: dict[int, str] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if id(module) in seen:
            seen[id(module)] = "it is called more than once"
        elif len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            seen[id(module)] = "it is called with something else than one tensor"
        else:
            seen[id(module)] = "" if isinstance(output, Tensor) else "it gives something else than one tensor"

    modes = [(module, module.training) for module in model.modules()]
    hooks = []
    try:
        for module, _ in modes:
            module.training = False
            hooks.append(module.register_forward_hook(note, with_kwargs=True))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return seen


def _owner(node: fx.Node) -> str:
    """The path of the module whose forward made a node."""
    return str(node.target) if node.op == "call_module" else node.meta.get("path", "")


@dataclass(frozen=True)
class _Region:
    """The operators of one submodule that computes act(x + ...).

    Args:
        nodes: all of them.
        input: x; made outside.
        output: the last of them.
        adds: the additions that x passes, last first.
    """

    nodes: frozenset[fx.Node]
    input: fx.Node
    output: fx.Node
    adds: tuple[fx.Node, ...]

    @staticmethod
    def of(graph: fx.GraphModule, path: str) -> _Region | str:
        """The region of a submodule, or why it is no residual block."""
        inside = {
            node
            for node in graph.graph.nodes
            if node.op in ("call_module", "call_function") and f"{_owner(node)}.".startswith(f"{path}.")
        }
        feeds = {arg for node in inside for arg in node.all_input_nodes if arg not in inside and _is_value(arg)}
        outputs = [node for node in inside if _is_value(node) and any(user not in inside for user in node.users)]
        if len(feeds) != 1:
            return "it reads something else than its input"
        if len(outputs) != 1:
            return "what is computed inside of it is read outside"
        source, output = feeds.pop(), outputs[0]
        was, now = source.meta.get("shape"), output.meta.get("shape")
        if was != now or source.meta.get("dtype") != output.meta.get("dtype"):
            return f"it changes the shape (without batch, {_size(was)} to {_size(now)})"
        for node in graph.graph.nodes:
            if node.op == "get_attr" and str(node.target).startswith(f"{path}.") and not set(node.users) <= inside:
                return f"its {str(node.target).removeprefix(path + '.')} is used outside of it"
        if any(_writes_into(graph, node, source) for node in inside):
            return "it changes its input in place before the addition"
        end = output.args[0] if _is_activation(graph, output) else output
        adds = _skip(end, source, inside)
        return "it does not end in the addition of its input" if not adds else _Region(
            frozenset(inside), source, output, adds
        )  # fmt: skip


def _is_value(node: fx.Node) -> bool:
    """Parameters and the batch size are no activations."""
    return node.op != "get_attr" and node.target is not aten.sym_size.int


def _size(shape: Any) -> str:
    return "x".join(map(str, shape[1:])) if shape else "no tensor"


def _writes_into(graph: fx.GraphModule, node: fx.Node, source: fx.Node) -> bool:
    """Whether a node overwrites the input of its region, other than by the addition that a block is."""
    if not node.args or node.args[0] is not source:
        return False
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    name = str(node.target).split(".")[1] if str(node.target).startswith("aten.") else ""
    return name.endswith("_") and node.target not in _ADDS


def _is_activation(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), _ACTIVATION_LAYERS)
    return _operator(node) in _ACTIVATIONS


def _operator(node: fx.Node) -> str:
    """`aten.relu_.default` -> `relu`."""
    name = str(node.target).split(".")
    return name[1].rstrip("_") if name[0] == "aten" and len(name) > 1 else ""


def _skip(node: Any, source: fx.Node, inside: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The additions between `source` and `node` on a way that has nothing else on it; () when there is no such way."""
    if not isinstance(node, fx.Node) or node not in inside or node.target not in _ADDS or node.kwargs:
        return ()
    if any(not isinstance(arg, fx.Node) or arg.meta.get("shape") != node.meta.get("shape") for arg in node.args):
        return ()
    if source in node.args:
        return (node,)
    for arg in node.args:
        if way := _skip(arg, source, inside):
            return (node, *way)
    return ()


def _choose(regions: dict[str, _Region], refused: dict[str, str]) -> None:
    """Leaves no two regions that overlap, and says why the others went."""
    for path in list(regions):  # the same operators twice, as in a Sequential of one block: the innermost is the block
        within = [p for p in regions if p.startswith(f"{path}.") and regions[p].nodes == regions[path].nodes]
        if within:
            refused[path] = f"it is nothing but {within[0]}; drop that"
            del regions[path]
    for path in list(regions):  # outer paths come first
        region = regions[path]
        parts = [p for p, r in regions.items() if r.nodes < region.nodes and r.adds[-1] in region.adds]
        if parts:
            refused[path] = f"it is several blocks ({', '.join(parts)}); drop these"
            del regions[path]
    for path in list(regions):
        outer = next((p for p, r in regions.items() if regions[path].nodes < r.nodes), None)
        if outer is not None:
            refused[path] = f"it is a part of {outer}, which can be dropped"
            del regions[path]


def _activation(graph: fx.GraphModule, region: _Region, ranges: Mapping[fx.Node, Range]) -> Activation:
    """What must stay of a block so that without its branch it is exactly act(x)."""
    node = region.output
    if not _is_activation(graph, node):
        return None
    bounds, (low, high) = clip_bounds(graph, node), ranges[region.input]
    if bounds is not None and bounds[0] <= low and high <= bounds[1]:
        return None
    if node.op == "call_module":
        return str(node.target)
    return [_ACTIVATIONS[_operator(node)], *node.args[1:], *node.kwargs.values()]


def _ranges(graph: fx.GraphModule) -> dict[fx.Node, Range]:
    """Between which values each node stays, whichever blocks are dropped: a sum may become any of its terms."""
    found: dict[fx.Node, Range] = {}
    for node in graph.graph.nodes:
        sources: list[Range] = [found[source] for source in node.all_input_nodes]
        found[node] = _range(graph, node, sources)
    return found


def _range(graph: fx.GraphModule, node: fx.Node, sources: list[Range]) -> Range:
    bounds = clip_bounds(graph, node)
    if bounds is not None:
        low, high = (min(max(value, bounds[0]), bounds[1]) for value in sources[0])
        return low, high
    if node.op == "call_module":
        layer = graph.get_submodule(str(node.target))
        if isinstance(layer, nn.Sigmoid | nn.Hardsigmoid):
            return 0.0, 1.0
        return sources[0] if isinstance(layer, _SAME_RANGE_LAYERS) else _EVERYTHING
    if node.target in _UNIT_RANGE:
        return 0.0, 1.0
    if node.target in _SAME_RANGE:
        return sources[0]
    if node.target in _ADDS and len(sources) == 2 and not node.kwargs:
        (a, b), (c, d) = sources
        return min(a, c, a + c), max(b, d, b + d)
    return _EVERYTHING


def paths_within(paths: Iterable[str], blocks: Iterable[str]) -> list[str]:
    """Those paths that lie in one of the blocks."""
    blocks = tuple(f"{block}." for block in blocks)
    return [path for path in paths if f"{path}.".startswith(blocks)]
