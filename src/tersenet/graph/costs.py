"""What a model costs: parameters, multiply-adds, bytes moved and peak activation memory, per layer and in all.

Everything is for one sample (batch 1). The conventions, because tools differ:

- `params` are learned numbers as papers count them: weights, biases, and the scales and shifts of norms, each once
  even where it is shared; running statistics are not learned. The integers of a quantized layer count as what they
  stand for.
- `param_bytes` is how these are stored: one byte for an int8. It takes everything of the state dict but the running
  statistics of norms, so masks and quantization scales count too.
- `macs` are multiply-adds of convolutions and matrix products, one each, over the whole of a dense layer: zeros in a
  weight and taps that fall on the padding are not taken off. A layer that is called twice counts twice.
- `multiplications` and `additions` are counted apart and over all operators, norms, pools and activations included. A
  division, a root or an exponential is one multiplication; comparisons, look-ups and moving data are nothing.
- `flops` is the headline 2 x macs (He et al., arXiv:1512.03385, call the macs themselves FLOPs; we do not).
- `bytes_moved` reads each input and each stored parameter and writes each output once per operator, as without a
  cache between operators. Views are free.
- `peak_activation_bytes` is the most that is alive at once when the graph runs in its order and frees a tensor after
  its last reader: inputs and outputs of the running operator included, parameters and scratch space not.
"""

from __future__ import annotations

import json
import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersenet.bricks.brick import Brick
from tersenet.graph.arithmetic import Counts, Shape, counts_of_layer, counts_of_operator, geometry, stands_for
from tersenet.graph.capture import Example
from tersenet.graph.trace import trace

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_VIEW_LAYERS = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.modules.dropout._DropoutNd,
)  # dropout does nothing in evaluation


@dataclass(frozen=True)
class LayerCost:
    """One layer, or all operators of one kind that lie in one module's own forward, for one sample.

    Args:
        path: the layer's path; for an operator the path of the module whose forward calls it.
        kind: the layer's type ("Conv2d"), or the operator's name ("add").
        params: learned numbers that no earlier row has.
        param_bytes: what is stored for them.
        macs: multiply-adds.
        multiplications: all of them, those of the macs included.
        additions: likewise.
        bytes_moved: inputs, parameters and outputs.
        output_shape: of the last call, with a batch of 1.
    """

    path: str
    kind: str
    params: int
    param_bytes: int
    macs: int
    multiplications: int
    additions: int
    bytes_moved: int
    output_shape: Shape

    @property
    def flops(self) -> int:
        return 2 * self.macs


@dataclass(frozen=True)
class Costs:
    """A whole model for one sample. `flops` is 2 x macs; `multiplications` also has those outside of the macs."""

    params: int
    param_bytes: int
    macs: int
    flops: int
    multiplications: int
    additions: int
    bytes_moved: int
    peak_activation_bytes: int


def costs(model: nn.Module, example: Example) -> list[LayerCost]:
    """The costs of each layer in order of its first call; (path, kind) is unique. Views have no row.

    Args:
        model: any module that `tersenet.graph.trace.trace` can capture; it is left as it was.
        example: (N, ...), or a tuple of all inputs; only its shape matters.
    Raises:
        TraceError: when the forward cannot be captured.
    """
    return _ledger(trace(model, example)).rows()


def totals(model: nn.Module, example: Example) -> Costs:
    """The costs of a whole model; parameters that the forward never uses count too, because files often ship them.

    Raises:
        TraceError: when the forward cannot be captured.
    """
    graph = trace(model, example)
    rows = _ledger(graph).rows()
    macs = sum(row.macs for row in rows)
    return Costs(
        params=_learned(model, set()),
        param_bytes=sum(map(_bytes, _stored(model))),
        macs=macs,
        flops=2 * macs,
        multiplications=sum(row.multiplications for row in rows),
        additions=sum(row.additions for row in rows),
        bytes_moved=sum(row.bytes_moved for row in rows),
        peak_activation_bytes=peak_activation_bytes(graph),
    )


def peak_activation_bytes(graph: fx.GraphModule) -> int:
    """The most bytes of activations alive at once, for one sample; `graph` is one of `trace`.

    In-place operators and views share the storage of what they are made from, which lives until the last of them is
    read. The input lives until its last reader, the outputs until the end.
    """
    samples, batched = _batch(graph), _batched(graph)
    nodes = list(graph.graph.nodes)
    storage: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for index, node in enumerate(nodes):
        source = _shares(graph, node)
        storage[node] = storage[source] if source is not None else node
        for reader in (node, *node.all_input_nodes):
            last[storage[reader]] = index
    alive: dict[fx.Node, int] = {}
    peak = 0
    for index, node in enumerate(nodes):
        if node.op != "get_attr" and storage[node] is node and "shape" in node.meta:
            alive[node] = _node_bytes(node) // (samples if node in batched else 1)
            peak = max(peak, sum(alive.values()))
        for owner in [owner for owner in alive if last[owner] <= index]:
            del alive[owner]
    return peak


class _Ledger:
    """Goes through a graph once and writes one row per layer. What depends on the input is divided by `samples`."""

    def __init__(self, graph: fx.GraphModule, samples: int) -> None:
        self.graph = graph
        self.samples = samples
        self.batched = _batched(graph)
        self.known: dict[Any, Counts] = {}  # arithmetic of bricks, by what they are
        self.seen: set[int] = set()  # ids of the stored tensors that a row has already

    def rows(self) -> list[LayerCost]:
        rows: dict[tuple[str, str], LayerCost] = {}
        for node in self._workers():
            row = self._row(node)
            key = (row.path, row.kind)
            rows[key] = _merged(rows[key], row) if key in rows else row
        return list(rows.values())

    def counts(self) -> Counts:
        """All arithmetic of the graph, for one sample."""
        return sum(map(self._counts, self._workers()), Counts())

    def _workers(self) -> list[fx.Node]:
        """The nodes that make new tensors."""
        return [
            node
            for node in self.graph.graph.nodes
            if node.op in ("call_module", "call_function") and _outputs(node) and not _is_view(self.graph, node)
        ]

    def _row(self, node: fx.Node) -> LayerCost:
        outputs = _outputs(node)
        moved = sum(_node_bytes(other) // self._share(other) for other in (*node.all_input_nodes, *outputs))
        counts = self._counts(node)
        if node.op == "call_module":
            layer = self.graph.get_submodule(str(node.target))
            tensors = _stored(layer)
            path, kind = str(node.target), type(layer).__name__.removeprefix("Parametrized")
            params = _learned(layer, self.seen)
            moved += sum(map(_bytes, tensors))
        else:
            sources = [source for source in node.all_input_nodes if source.op == "get_attr"]
            tensors = [operator.attrgetter(str(source.target))(self.graph) for source in sources]
            tensors = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
            path, kind = node.meta.get("path", ""), _name(node)
            params = sum(tensor.numel() for tensor in tensors if id(tensor) not in self.seen)
        stored = sum(_bytes(tensor) for tensor in tensors if id(tensor) not in self.seen)
        self.seen.update(map(id, tensors))
        shape = outputs[-1].meta["shape"]
        if self._share(node) > 1 and shape and shape[0] == self.samples:
            shape = (1, *shape[1:])
        return LayerCost(
            path, kind, params, stored, counts.macs, counts.multiplications, counts.additions, moved, shape
        )

    def _counts(self, node: fx.Node) -> Counts:
        outputs = _outputs(node)[0].meta["shape"]
        if node.op == "call_function":
            shapes = [_shapes(arg) for arg in node.args]
            return counts_of_operator(_name(node), node.args, shapes, outputs) // self._share(node)
        layer = self.graph.get_submodule(str(node.target))
        source = node.all_input_nodes[0]
        if type(layer).__module__.startswith("torch.nn") or stands_for(layer, _stored(layer)):
            known = counts_of_layer(layer, source.meta["shape"], outputs)
            if known is not None:
                return known // self._share(node)
        return self._inner(layer, source.meta["shape"], source.meta["dtype"], self._share(node))

    def _inner(self, layer: nn.Module, shape: Shape, dtype: torch.dtype, samples: int) -> Counts:
        """A layer without a formula is counted by what its forward does; bricks of one configuration do the same."""
        key = None
        if isinstance(layer, Brick):
            key = (type(layer), json.dumps(layer.config(), sort_keys=True), shape, dtype, samples)
        if key not in self.known:
            counts = _Ledger(trace(layer, torch.zeros(shape, dtype=dtype)), samples).counts()
            if key is None:
                return counts
            self.known[key] = counts
        return self.known[key]

    def _share(self, node: fx.Node) -> int:
        return self.samples if node in self.batched else 1


def _ledger(graph: fx.GraphModule) -> _Ledger:
    return _Ledger(graph, _batch(graph))


def _merged(row: LayerCost, again: LayerCost) -> LayerCost:
    """Two calls of one layer: what it stores is in the first row already."""
    names = ("params", "param_bytes", "macs", "multiplications", "additions", "bytes_moved")
    sums = {name: getattr(row, name) + getattr(again, name) for name in names}
    return replace(again, **sums)


def _batch(graph: fx.GraphModule) -> int:
    """The batch of the example that the graph was traced with."""
    return next(node.meta["shape"][0] for node in graph.graph.nodes if node.op == "placeholder")


def _batched(graph: fx.GraphModule) -> set[fx.Node]:
    """The nodes that depend on the input, so that their work grows with the batch."""
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _outputs(node: fx.Node) -> list[fx.Node]:
    """The node itself, or for an operator of several results the nodes that pick them out."""
    if node.target is operator.getitem:
        return []
    if "shape" in node.meta:
        return [node]
    return [user for user in node.users if user.target is operator.getitem and "shape" in user.meta]


def _shapes(arg: Any) -> Any:
    """Shape of a tensor, list of shapes for a list of tensors, None for anything else."""
    if isinstance(arg, fx.Node):
        return arg.meta.get("shape")
    if isinstance(arg, list | tuple) and arg and all(isinstance(entry, fx.Node) for entry in arg):
        return [_shapes(entry) for entry in arg]
    return None


def _shares(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The node in whose storage this one's result lies: the source of a view or of an in-place operator."""
    if not node.all_input_nodes:
        return None
    source = node.all_input_nodes[0]
    if node.op == "call_module":
        layer = graph.get_submodule(str(node.target))
        return source if isinstance(layer, _VIEW_LAYERS) or getattr(layer, "inplace", False) is True else None
    if node.target is operator.getitem:
        return source if _shares(graph, source) is not None else None
    if _name(node) == "dropout":
        return source
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(result.alias_info is not None for result in schema.returns):
        return None
    # `to` and `contiguous` say that they may be views; another type never is.
    return None if node.meta.get("dtype", source.meta.get("dtype")) != source.meta.get("dtype") else source


def _is_view(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether nothing is computed or written: the result only reads what its source holds."""
    if _shares(graph, node) is None:
        return False
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), _VIEW_LAYERS)
    schema = getattr(node.target, "_schema", None)  # picking one of several views has none
    return schema is None or not any(
        result.alias_info is not None and result.alias_info.is_write for result in schema.returns
    )


def _name(node: fx.Node) -> str:
    """`aten.add_.Tensor` -> "add"."""
    name = str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target))
    return name if name.startswith("_") else name.rstrip("_")


def _node_bytes(node: fx.Node) -> int:
    return math.prod(node.meta["shape"]) * node.meta["dtype"].itemsize if "shape" in node.meta else 0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _stored(module: nn.Module) -> list[Tensor]:
    """The tensors that a file of this module must hold, each once; the statistics of norms are left out."""
    state = module.state_dict(keep_vars=True)
    tensors = {
        id(value): value
        for name, value in state.items()
        if isinstance(value, Tensor) and name.rpartition(".")[2] not in _STATISTICS
    }
    return list(tensors.values())


def _learned(module: nn.Module, seen: set[int]) -> int:
    """Learned numbers, those in `seen` left out; integers that stand for a weight count as that weight."""
    total = sum(parameter.numel() for parameter in module.parameters() if id(parameter) not in seen)
    for layer in module.modules():
        shape, buffers = geometry(layer), list(layer.buffers(recurse=False))
        if shape is None or not buffers or any(parameter.dim() >= 2 for parameter in layer.parameters()):
            continue
        if all(id(buffer) not in seen for buffer in buffers):
            bias = getattr(layer, "bias", None)
            total += math.prod(shape) + (bias.numel() if bias is not None and not isinstance(bias, nn.Parameter) else 0)
    return total
