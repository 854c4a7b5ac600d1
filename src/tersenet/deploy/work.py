"""What each row of a profile does for one sample: its multiply-adds, and the bytes it moves as its runtime stores them.

Counts are those of `tersenet.graph.costs`. Bytes are those too for a float model. In a quantized one a runtime keeps
integers where our modules simulate them in floats, so there a value that a quantizer makes, or that only goes into
one (through a ReLU, say), is one byte a number, and so is the weight of a quantized layer. Weights and activations are
apart, because a batch repeats only the activations, and because they may lie in different memory.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from tersenet.bricks.quantized import ScaledLayer
from tersenet.bricks.quantizer import Quantizer
from tersenet.graph.costs import LayerCost

Key = tuple[str, str]  # (path, kind) of a row; ("", operator) for what belongs to no layer

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# What a runtime does on the way into a quantizer or out of one, without going back to floats.
_ACTIVATIONS = {"relu", "relu6", "clamp", "clamp_min", "hardtanh", "ReLU", "ReLU6", "Hardtanh"}
_VIEWS = {"flatten", "view", "reshape", "Flatten"}


@dataclass(frozen=True)
class Work:
    """One row, for one sample.

    Args:
        path, kind: which; the pair is unique.
        params: learned numbers that no earlier row has.
        param_bytes: what is stored for them.
        macs: multiply-adds.
        weight_bytes: parameters read by one call, whatever the batch.
        activation_bytes: inputs read and outputs written.
        output_shape: of the last call, with a batch of 1.
        precision: "float32" or "int8": in what the multiply-adds can be done.
        inputs, outputs: channels of one group (0: no channels that are known).
        groups: of a convolution, else 1.
        positions: how often the weights are used, such as H x W of the output.
    """

    path: str
    kind: str
    params: int = 0
    param_bytes: int = 0
    macs: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    output_shape: tuple[int, ...] = ()
    precision: str = "float32"
    inputs: int = 0
    outputs: int = 0
    groups: int = 1
    positions: int = 1

    @property
    def key(self) -> Key:
        return self.path, self.kind


def works_of(
    graph: fx.GraphModule, layers: Sequence[LayerCost], keys: Mapping[fx.Node, Key], integers: bool
) -> list[Work]:
    """The rows of a model.

    Args:
        graph: of `tersenet.graph.trace.trace`.
        layers: its costs.
        keys: the row of each node that has one.
        integers: whether the runtime computes a quantized layer in integers; PyTorch does not.
    """
    nodes: dict[Key, list[fx.Node]] = defaultdict(list)
    for node, key in keys.items():
        nodes[key].append(node)
    return [_work(graph, layer, nodes[layer.path, layer.kind], integers) for layer in layers]


def _work(graph: fx.GraphModule, layer: LayerCost, nodes: Sequence[fx.Node], integers: bool) -> Work:
    wide = narrow = stored = kept = 0  # bytes of activations and of weights, as costs has them and as the runtime has
    shape: dict[str, int] = {}
    precision = "float32"
    for node in nodes:
        for value in (*node.all_input_nodes, node):
            if "shape" not in value.meta:
                continue
            count, size = math.prod(value.meta["shape"]), value.meta["dtype"].itemsize
            if value.op == "get_attr":
                stored, kept = stored + count * size, kept + count * size
            else:
                wide += count * size
                narrow += count * (1 if integers and size == 4 and _narrow(graph, value) else size)
        if node.op == "call_module":
            module = graph.get_submodule(str(node.target))
            whole, small = _weights(module, integers)
            stored, kept = stored + whole, kept + small
            shape = _channels(module, layer.output_shape)
            if integers and isinstance(module, ScaledLayer) and module.input_quantized:
                precision = "int8"
    activations = max(layer.bytes_moved - stored, 0)
    return Work(
        layer.path,
        layer.kind,
        layer.params,
        layer.param_bytes,
        layer.macs,
        kept,
        round(activations * narrow / wide) if wide else activations,
        tuple(layer.output_shape),
        precision,
        **shape,
    )


def _weights(module: nn.Module, integers: bool) -> tuple[int, int]:
    """Bytes of a layer's parameters: as they are stored, and as the runtime reads them."""
    tensors = {
        id(value): value
        for name, value in module.state_dict(keep_vars=True).items()
        if name.rpartition(".")[2] not in _STATISTICS
    }
    stored = sum(value.numel() * value.element_size() for value in tensors.values())
    weight = getattr(module, "weight", None)
    if integers and isinstance(module, ScaledLayer) and weight is not None:
        return stored, stored - weight.numel() * (weight.element_size() - 1)
    return stored, stored


def _channels(module: nn.Module, output: Sequence[int]) -> dict[str, int]:
    if isinstance(module, nn.modules.conv._ConvNd):
        groups = module.groups
        inputs, outputs = module.in_channels // groups, module.out_channels // groups
        return {"inputs": inputs, "outputs": outputs, "groups": groups, "positions": math.prod(output[2:])}
    if isinstance(module, nn.Linear):
        return {"inputs": module.in_features, "outputs": module.out_features, "positions": math.prod(output[1:-1])}
    return {}


def _narrow(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a runtime keeps this value in one byte a number."""
    source = node
    while _name(graph, source) in _VIEWS:
        source = source.all_input_nodes[0]
    return _name(graph, source) == Quantizer.__name__ or _only_quantized(graph, source)


def _only_quantized(graph: fx.GraphModule, node: fx.Node) -> bool:
    names = [(user, _name(graph, user)) for user in node.users]
    return bool(names) and all(
        name == Quantizer.__name__ or (name in _ACTIVATIONS and _only_quantized(graph, user)) for user, name in names
    )


def _name(graph: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target))).__name__
    name = str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target))
    return name.rstrip("_") if node.op == "call_function" else ""
