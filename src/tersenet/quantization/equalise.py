"""Channels evened out between layers, before anything is rounded, so that one grid serves all of them.

Nagel et al., "Data-free quantization through weight equalization and bias correction", arXiv:1906.04721, section 4.1:
where only operators with f(s x) = s f(x) lie between two layers, a channel of the first can be made smaller and the
second's weights for it larger. Pairs are repeated until nothing changes. A clip at 6 (ReLU6) has no such s; as in the
paper it becomes a ReLU, which `apply` does and which the ranges of activations make up for.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from tersenet.bricks.brick import Brick
from tersenet.bricks.coded import RoundedLayer
from tersenet.bricks.mask import stored_weight
from tersenet.bricks.quantized import QuantizedLayer
from tersenet.bricks.quantizer import Quantizer
from tersenet.graph.outside_reads import read_by_graph
from tersenet.graph.points import clip_bounds
from tersenet.numerics.equalisation import equalisation_factors, input_ranges, output_ranges

aten = torch.ops.aten
_ROUNDS = 20
# Factors nearer to 1 than this end the rounds.
_SETTLED = 1e-3
_PER_CHANNEL = (nn.MaxPool2d, nn.AvgPool2d, nn.Identity, nn.Dropout, nn.Dropout2d)
_PER_CHANNEL_OPERATORS = (aten.max_pool2d.default, aten.avg_pool2d.default, aten.dropout.default)


@dataclass(frozen=True)
class Pair:
    """Two layers, and the names of the clips between them that would have to go."""

    first: str
    second: str
    clips: tuple[str, ...] = ()


def find_pairs(graph: fx.GraphModule) -> list[Pair]:
    """Layers of which the second alone reads the first, with nothing between them that scaling would change."""
    calls = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
    read = read_by_graph(graph)
    found = []
    for node in graph.graph.nodes:
        if _layer(graph, node) is None or calls[node.target] != 1 or node.target in read:
            continue
        clips, reader = [], node
        while len(reader.users) == 1:
            reader = next(iter(reader.users))
            bounds = clip_bounds(graph, reader)
            if bounds is not None and bounds[0] == 0:
                clips += [reader.name] if math.isfinite(bounds[1]) else []
            elif not _per_channel(graph, reader):
                break
        second = _layer(graph, reader)
        if reader is not node and second is not None and calls[reader.target] == 1 and reader.target not in read:
            found.append(Pair(str(node.target), str(reader.target), tuple(clips)))
    return found


def _layer(graph: fx.GraphModule, node: fx.Node) -> Any:
    """The convolution or linear layer that a node calls; None where it calls something else."""
    layer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    plain = isinstance(layer, nn.Conv2d | nn.Linear)
    return (
        layer if plain and (not isinstance(layer, Brick) or isinstance(layer, QuantizedLayer | RoundedLayer)) else None
    )


def _per_channel(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), (Quantizer, *_PER_CHANNEL))
    return node.op == "call_function" and node.target in _PER_CHANNEL_OPERATORS


def unclip(graph: fx.GraphModule, names: list[str]) -> None:
    """Makes ReLUs of clips. Raises KeyError on a name that the graph does not have."""
    nodes = {node.name: node for node in graph.graph.nodes}
    for name in names:
        node = nodes[name]
        with graph.graph.inserting_after(node):
            new = graph.graph.create_node("call_function", aten.relu.default, (node.args[0],), name=f"{name}_unclipped")
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.recompile()


def equalise(graph: fx.GraphModule) -> int:
    """Scales the channels of all pairs, in place; what the network computes stays. Returns the number of pairs."""
    pairs = [pair for pair in find_pairs(graph) if not pair.clips]
    with torch.no_grad():
        for _ in range(_ROUNDS):
            furthest = 0.0
            for pair in pairs:
                furthest = max(furthest, _even_out(graph.get_submodule(pair.first), graph.get_submodule(pair.second)))
            if furthest < _SETTLED:
                break
    return len(pairs)


def _even_out(first: Any, second: Any) -> float:
    """Scales the channels between two layers; how far the factors were from 1, as a logarithm."""
    groups = getattr(second, "groups", 1)
    factors = equalisation_factors(output_ranges(first.weight), input_ranges(second.weight, groups))
    weight = stored_weight(first)
    weight.div_(factors.reshape(-1, *(1,) * (weight.dim() - 1)))
    if first.bias is not None:
        first.bias.div_(factors)
    weight = stored_weight(second)
    rows = weight.view(groups, -1, *weight.shape[1:])  # (G, O / G, I / G, ...)
    rows.mul_(factors.view(groups, 1, -1, *(1,) * (weight.dim() - 2)))
    return float(factors.log().abs().max())
