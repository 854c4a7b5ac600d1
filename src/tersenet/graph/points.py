"""Where activations must be rounded so that int8 runtimes run the whole network in integers.

A runtime fuses an operator into int8 when every input and the output of it are quantized. So a value is rounded where
- a quantized layer reads it (the model's input among them), or
- it leaves a quantized convolution, because no runtime here has an int8 convolution with a float output, or
- it leaves an addition, multiplication, pooling or concatenation whose result is rounded further on, or
- it is a sum, or comes out of a convolution, and a batch norm reads it whose result is rounded (`graph/norms.py`);
always after the ReLU or clip that follows directly, never between (the clip is then part of the rounding). The model's
outputs stay float. Operators that only move or choose values keep the grid of their input, and so do the inputs of a
concatenation if they are bounded alike (a ReLU cannot be part of a rounding that reaches below zero); values that share
a grid form one group. This is what ONNX Runtime's QDQ fusion
(onnxruntime/core/optimizer/qdq_transformer) and OpenVINO's low-precision transformations ask for.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from tersenet.bricks.quantizer import Quantizer
from tersenet.graph.norms import fits_one_grid, is_fixed_norm
from tersenet.graph.zero_pads import pads_with_zeros

aten = torch.ops.aten

_CLIPS = {aten.relu.default, aten.relu_.default, aten.relu6.default}
_RANGED_CLIPS = {aten.hardtanh.default, aten.hardtanh_.default, aten.clamp.default, aten.clamp_.default}
_ADDS = {aten.add.Tensor, aten.add_.Tensor, operator.add}
_MULS = {aten.mul.Tensor, aten.mul_.Tensor, operator.mul}
_CONCATS = {aten.cat.default, aten.concat.default}
_POOL_LAYERS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_POOLS = {aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim}
_SAME_LAYERS = (
    nn.MaxPool2d,
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.PixelShuffle,
    nn.ChannelShuffle,
)
_SAMES = {
    aten.max_pool2d.default,
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.dropout.default,
    aten.slice.Tensor,
    aten.pixel_shuffle.default,
    aten.channel_shuffle.default,
}


@dataclass(frozen=True)
class Points:
    """Where to round.

    Attributes:
        groups: name of a grid -> names of the nodes whose value is rounded to it, in the order of the forward.
        floats: node name -> operator or layer type, of the operators that compute in float although what they read
            is rounded. They cost speed.
    """

    groups: dict[str, list[str]] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)


def activation_points(graph: fx.GraphModule, quantized: Collection[str], copies: Collection[str] = ()) -> Points:
    """Finds the points of a traced model.

    Args:
        graph: from `graph.trace.trace`, with batch norms folded.
        quantized: paths of the layers that will be quantized.
        copies: those of them that only move values, so that their output keeps the grid of their input.
    """
    return _Walk(graph, set(quantized), set(copies)).points()


class _Walk:
    def __init__(self, graph: fx.GraphModule, quantized: set[str], copies: set[str]) -> None:
        self.graph, self.quantized, self.copies = graph, quantized, copies
        self.nodes = list(graph.graph.nodes)
        self.constants = constants(self.nodes)
        self.kinds = {node: self._kind(node) for node in self.nodes}
        self.parent: dict[fx.Node, fx.Node] = {}
        self.rounded: set[fx.Node] = set()

    def points(self) -> Points:
        # Backwards: whether a value is rounded depends on what reads it.
        for node in reversed(self.nodes):
            if self._is_activation(node) and self._must_round(node):
                self.rounded.add(node)
        for node in self.nodes:  # OpenVINO rounds the means of integers to the grid of those, unless told a finer one
            source = node.args[0] if self.kinds[node] == "pool" and not is_global_pool(self.graph, node) else None
            if source in self.rounded and self._end(node) is node and not self._only_leaves(node):
                self.rounded.add(node)
        self._share()
        groups: dict[str, list[str]] = {}
        names: dict[fx.Node, str] = {}
        for node in self.nodes:
            if node in self.rounded:
                root = self._root(node)
                if root not in names:
                    name = f"{_path_name(node)}_out"
                    # A ReLU that is called again has the path of the first call, and its values a range of their own.
                    names[root] = name if name not in groups else _free(f"{node.name}_out", groups)
                groups.setdefault(names[root], []).append(node.name)
        return Points(groups, self._floats())

    def _kind(self, node: fx.Node) -> str:
        if node.op == "call_module":
            layer = self.graph.get_submodule(str(node.target))
            if node.target in self.quantized:
                return "convolution" if isinstance(layer, nn.Conv2d) else "linear"
            if _starts_at_zero(clip_bounds(self.graph, node)):
                return "clip"
            if isinstance(layer, _POOL_LAYERS):
                return "pool"
            return "same" if self._keeps_its_grid(node) else "float"
        if node.op != "call_function":
            return node.op
        return self._kind_of_operator(node)

    def _kind_of_operator(self, node: fx.Node) -> str:
        target = node.target
        if _starts_at_zero(clip_bounds(self.graph, node)):
            return "clip"
        if target in _ADDS or target in _MULS:
            both = len(node.args) == 2 and all(isinstance(a, fx.Node) and self._is_activation(a) for a in node.args)
            return ("add" if target in _ADDS else "mul") if both and not node.kwargs else "float"
        if target in _CONCATS:
            return "concat" if all(map(self._is_activation, node.all_input_nodes)) else "float"
        if target in _POOLS:
            return "pool" if target is not aten.mean.dim or is_global_pool(self.graph, node) else "float"
        return "same" if self._keeps_its_grid(node) else "float"

    def _keeps_its_grid(self, node: fx.Node) -> bool:
        return only_moves(self.graph, node) or pads_with_zeros(self.graph, node)

    def _is_activation(self, node: fx.Node) -> bool:
        return (
            node not in self.constants
            and node.op != "output"
            and node.meta.get("dtype") in (torch.float32, torch.float16, torch.float64)
        )

    def _end(self, node: fx.Node) -> fx.Node:
        """The clip that is fused into this node, or the node itself."""
        user = next(iter(node.users)) if len(node.users) == 1 else None
        return (
            user
            if user is not None and self.kinds[user] == "clip" and self.kinds[node] not in ("clip", "same")
            else node
        )

    def _must_round(self, node: fx.Node) -> bool:
        if self._end(node) is not node:
            return False
        if any(self._reads_rounded(user) for user in node.users) or self._is_normed(node):
            return True
        start = node
        if self.kinds[node] == "clip" and self._end(node.args[0]) is node:  # type: ignore[arg-type]
            start = node.args[0]  # type: ignore[assignment]
        return self.kinds[start] == "convolution" and not self._only_leaves(node)

    def _reads_rounded(self, user: fx.Node) -> bool:
        kind = self.kinds[user]
        if kind in ("convolution", "linear"):
            return True
        if kind in ("add", "mul", "concat", "pool"):
            return self._end(user) in self.rounded
        return kind == "same" and user in self.rounded

    def _is_normed(self, node: fx.Node) -> bool:
        """Whether a sum, or what moves what is rounded anyway, is read by a norm that goes on to a grid."""
        norms = [user for user in node.users if is_fixed_norm(self.graph, user) and self._end(user) in self.rounded]
        if not norms:
            return False
        if self.kinds[node] == "same":
            return self.kinds[self._source(node)] == "convolution"
        return self.kinds[node] == "add" and all(
            fits_one_grid(self.graph.get_submodule(str(norm.target))) for norm in norms
        )

    def _source(self, node: fx.Node) -> fx.Node:
        """What a value is moved, chosen or clipped from."""
        while self.kinds[node] in ("same", "clip"):
            node = node.args[0]  # type: ignore[assignment]
        return node

    def _only_leaves(self, node: fx.Node) -> bool:
        """Whether a value goes to the model's outputs and nowhere else."""
        return all(u.op == "output" or (self.kinds[u] == "same" and self._only_leaves(u)) for u in node.users)

    def _share(self) -> None:
        """Joins the values that must have one grid."""
        seen: dict[str, fx.Node] = {}
        for node in self.nodes:
            kind = self.kinds[node]
            copies = kind == "convolution" and node.target in self.copies
            alike = kind == "concat" and len({self._bounds(source) for source in node.all_input_nodes}) == 1
            if (kind == "same" or alike or copies) and node in self.rounded:
                for source in node.all_input_nodes:
                    if source in self.rounded:
                        self._join(source, node)
            if kind in ("convolution", "linear"):  # a layer that is called twice has one input scale
                first = seen.setdefault(str(node.target), node.args[0])
                self._join(first, node.args[0])

    def _bounds(self, node: fx.Node) -> tuple[float, float] | None:
        """Between which values the clips in front of a value keep it; None when there are none."""
        if self.kinds[node] in ("same", "pool"):
            return self._bounds(node.args[0])  # type: ignore[arg-type]
        if self.kinds[node] == "concat":
            found = {self._bounds(source) for source in node.all_input_nodes}
            return found.pop() if len(found) == 1 else None
        return clip_bounds(self.graph, node)

    def _root(self, node: fx.Node) -> fx.Node:
        while node in self.parent:
            node = self.parent[node]
        return node

    def _join(self, a: fx.Node, b: fx.Node) -> None:
        a, b = self._root(a), self._root(b)
        if a is not b:
            self.parent[b] = a

    def _floats(self) -> dict[str, str]:
        found = {}
        for node in self.nodes:
            if self.kinds[node] in ("placeholder", "output", "get_attr", "convolution", "linear", "clip", "same"):
                continue
            if self.kinds[node] != "float" and self._end(node) in self.rounded:
                continue
            if self._is_activation(node) and any(source in self.rounded for source in node.all_input_nodes):
                layer = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
                found[node.name] = type(layer).__name__ if layer is not None else str(node.target)
        return found


def constants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes whose values are the same for every input, but for their batch: parameters, and what is made of them.

    OpenVINO 2026 stops at a concatenation of integers with such a value (a class token) that is rounded too.
    """
    found: set[fx.Node] = set()
    for node in nodes:
        floats = [source for source in node.all_input_nodes if isinstance(source.meta.get("dtype"), torch.dtype)]
        computed = node.op == "call_function" or (node.op == "call_module" and not _is_quantizer(node))
        fixed = computed and bool(floats) and all(source in found for source in floats)
        made = isinstance(node.target, torch._ops.OpOverload) and not floats and "dtype" in node.meta  # such as arange
        if node.op == "get_attr" or fixed or made:
            found.add(node)
    return found


def layers_on_constants(graph: fx.GraphModule, layers: Collection[str], points: Points) -> set[str]:
    """Paths of those layers that read no activation, such as the layers of an MLP of relative positions."""
    rounded = {name for group in points.groups.values() for name in group}
    calls = [node for node in graph.graph.nodes if node.op == "call_module" and node.target in layers]
    return {str(node.target) for node in calls if node.args[0].name not in rounded}


def clip_bounds(graph: fx.GraphModule, node: fx.Node) -> tuple[float, float] | None:
    """Between which values a ReLU, ReLU6 or clip keeps its input; None for other operators."""
    if node.op == "call_module":
        layer = graph.get_submodule(str(node.target))
        if isinstance(layer, nn.Hardtanh):  # ReLU6 too
            return float(layer.min_val), float(layer.max_val)
        return (0.0, math.inf) if isinstance(layer, nn.ReLU) else None
    if node.op != "call_function":
        return None
    if node.target in _CLIPS:
        return 0.0, 6.0 if node.target is aten.relu6.default else math.inf
    if node.target in _RANGED_CLIPS:
        low, high = (*node.args[1:], None, None)[:2]
        if node.kwargs or isinstance(low, fx.Node) or isinstance(high, fx.Node):
            return None
        defaults = (
            (-1.0, 1.0) if node.target in (aten.hardtanh.default, aten.hardtanh_.default) else (-math.inf, math.inf)
        )
        return float(defaults[0] if low is None else low), float(defaults[1] if high is None else high)  # type: ignore[arg-type]
    return None


def is_addition(node: fx.Node) -> bool:
    """Whether a node adds two values of the graph, and does nothing else."""
    return node.op == "call_function" and node.target in _ADDS and len(node.all_input_nodes) == 2 and not node.kwargs


def centred_quantizers(graph: fx.GraphModule) -> dict[str, bool]:
    """Paths of the quantizers that are better with a grid around 0: those of an input, of what is only added up, and of
    what batch norms read; and whether norms read them.

    A convolution that pads its input needs no correction then, and one that takes over an addition (OpenVINO) none for
    what it adds; in front of a norm OpenVINO converts to float what does not lie around 0.
    """
    good: dict[str, bool] = {}
    normed: dict[str, bool] = {}
    for path, node in _quantizer_calls(graph):
        source = node.args[0]
        first = isinstance(source, fx.Node) and source.op == "placeholder"
        norms = [is_fixed_norm(graph, user) for user in node.users]
        added = bool(node.users) and all(
            norm or is_addition(user) for user, norm in zip(node.users, norms, strict=True)
        )
        good[path] = good.get(path, True) and (first or added)
        normed[path] = normed.get(path, False) or any(norms)
    return {path: normed[path] for path, centred in good.items() if centred}


def signed_quantizers(graph: fx.GraphModule, shared: bool = False) -> set[str]:
    """Paths of the quantizers that are written as int8 where they lie around 0, of `centred_quantizers`.

    OpenVINO takes int8 for all of them. ONNX Runtime makes uint8 of such a value, for which it has the kernels, only
    where one operator reads it; with more of them, their convolution would stay float.

    Args:
        shared: whether those that several operators read are among them.
    """
    signed = set(centred_quantizers(graph))
    return signed - {path for path, node in _quantizer_calls(graph) if len(node.users) > 1 and not shared}


def _quantizer_calls(graph: fx.GraphModule) -> Iterator[tuple[str, fx.Node]]:
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), Quantizer):
            yield str(node.target), node


def is_concatenation(node: fx.Node) -> bool:
    """Whether a node concatenates values of the graph."""
    return node.op == "call_function" and node.target in _CONCATS


def only_moves(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node moves or chooses values of its one input."""
    if node.op == "call_module":
        layer = graph.get_submodule(str(node.target))
        return isinstance(layer, _SAME_LAYERS) and not _returns_indices(layer)
    return node.op == "call_function" and node.target in _SAMES


def is_global_pool(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is the mean over H and W of (N, C, H, W), however it was written."""
    if not node.args or not isinstance(node.args[0], fx.Node) or len(node.args[0].meta.get("shape", ())) != 4:
        return False
    if node.op == "call_module":
        layer = graph.get_submodule(str(node.target))
        return isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1))
    if node.target is aten.adaptive_avg_pool2d.default:
        return list(node.args[1]) == [1, 1]  # type: ignore[arg-type]
    if node.target is not aten.mean.dim or not isinstance(node.args[1], list | tuple):
        return False
    return sorted(int(dim) % 4 for dim in node.args[1]) == [2, 3]  # type: ignore[arg-type]


def _is_quantizer(node: fx.Node) -> bool:
    owner = node.graph.owning_module
    return owner is not None and isinstance(owner.get_submodule(str(node.target)), Quantizer)


def _starts_at_zero(bounds: tuple[float, float] | None) -> bool:
    return bounds is not None and bounds[0] == 0


def _returns_indices(layer: nn.Module) -> bool:
    return bool(getattr(layer, "return_indices", False))


def _path_name(node: fx.Node) -> str:
    """A name that can be a module's: the layer's path where the node is one."""
    return str(node.target if node.op == "call_module" else node.name).replace(".", "_")


def _free(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name += "_"
    return name


def insert_after(graph: fx.GraphModule, groups: dict[str, list[str]], path: str, make: Callable[[], nn.Module]) -> None:
    """Puts one module per group, at `path`.name, and calls it on every node of the group.

    Raises:
        KeyError: naming the node that the graph does not have.
    """
    by_name = {node.name: node for node in graph.graph.nodes}
    for name, members in groups.items():
        graph.add_submodule(f"{path}.{name}", make())
        for member in members:
            node = by_name[member]
            users = list(node.users)
            with graph.graph.inserting_after(node):
                new = graph.graph.call_module(f"{path}.{name}", (node,))
            new.meta = dict(node.meta)
            for user in users:
                user.replace_input_with(node, new)
    graph.recompile()
