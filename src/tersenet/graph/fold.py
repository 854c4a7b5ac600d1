"""Folding batch norms into the layers before them, exactly.

In evaluation a batch norm is a fixed scale and shift per channel, which the convolution or linear layer in front can
take over: Jacob et al., "Quantization and training of neural networks", arXiv:1712.05877, section 3.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from tersenet.bricks.brick import Brick
from tersenet.bricks.few_bits import FewBitLayer
from tersenet.bricks.mask import at_most_masked, only_masked, stored_weight
from tersenet.graph.capture import Example
from tersenet.graph.outside_reads import TENSORS, by_path, keep_reads, outside_reads
from tersenet.graph.trace import trace
from tersenet.graph.undone_views import SHAPED_LIKE, drop_undone_views, is_view


def foldable(graph: fx.GraphModule) -> list[tuple[str, str]]:
    """(layer, norm) paths of the batch norms that can be folded.

    The norm must be the only user of the layer, both must be called once, and the norm must keep running statistics.
    A layer with a mask keeps it; one with another parametrization is left alone: settle it first.
    """
    return [(str(_layer_before(node).target), str(node.target)) for node, why in _norms(graph) if why is None]


def why_not_foldable(graph: fx.GraphModule) -> dict[str, str]:
    """Path of every other batch norm that is called -> why it cannot be folded."""
    return {str(node.target): why for node, why in _norms(graph) if why is not None}


def foldable_in(model: nn.Module, example: Example) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """`foldable` and `why_not_foldable` of a model's graph, for folding in the model itself.

    There a norm goes, and its layer gets other numbers, so that nobody else may read of either.

    Raises:
        TraceError: when the forward cannot be captured.
    """
    graph = trace(model, example)
    reads = outside_reads(model, example)
    of_norms, of_layers = by_path(reads), by_path(reads, TENSORS)
    pairs, why = [], why_not_foldable(graph)
    for layer, norm in foldable(graph):
        if norm in of_norms:
            why[norm] = of_norms[norm]
        elif layer in of_layers:
            why[norm] = "stand behind layers that " + of_layers[layer]
        else:
            pairs.append((layer, norm))
    return pairs, why


def _norms(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, str | None]]:
    """Every call of a batch norm, and why it cannot be folded."""
    calls = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), _BatchNorm):
            yield node, _why_not(graph, node, calls)


def _layer_before(norm: fx.Node) -> fx.Node:
    """What a norm reads; where that is a linear layer's output with the leading dimensions made one, the layer."""
    before = norm.args[0]
    assert isinstance(before, fx.Node)
    source = before.args[0] if is_view(before) and len(before.users) == 1 else None
    if isinstance(source, fx.Node) and len(before.meta["shape"]) == 2 and source.meta.get("shape"):
        return source if source.meta["shape"][-1] == before.meta["shape"][-1] else before
    return before


def _why_not(graph: fx.GraphModule, node: fx.Node, calls: Mapping[Any, int]) -> str | None:
    norm: Any = graph.get_submodule(str(node.target))
    before = _layer_before(node)
    if before.op != "call_module":
        return "have no layer right before them"
    layer: Any = graph.get_submodule(str(before.target))
    if not isinstance(layer, _ConvNd | nn.Linear):
        return f"stand behind {type(layer).__name__}, which is no convolution or linear layer"
    if calls[node.target] != 1 or calls[before.target] != 1:
        return "are called more than once, or their layer is"
    if sum(user.target not in SHAPED_LIKE or user.args[0] is before for user in before.users) != 1:
        return "stand behind a layer whose output is used elsewhere, too"
    if norm.running_mean is None:
        return "keep no running statistics"
    if isinstance(layer, Brick) and not isinstance(layer, FewBitLayer):
        return "stand behind a quantized layer"
    if not at_most_masked(layer) or parametrize.is_parametrized(norm):
        return "have a parametrization, or their layer has; settle it first"
    if isinstance(layer, nn.Linear) and len(node.args[0].meta["shape"]) != 2:  # type: ignore[union-attr]
        return "stand behind a linear layer over more than one dimension"
    return None


def fold(layer: Any, norm: Any) -> None:
    """Moves an evaluating batch norm into the weight and bias of the layer before it; gives it a bias if it has none.

    weight' = weight * g / sqrt(var + eps), bias' = (bias - mean) * g / sqrt(var + eps) + b, per output channel. Numbers
    under a mask are scaled like the others, so the mask still means the same. A layer of few values keeps its weight
    and takes the factor over as its `gain`.
    """
    with torch.no_grad():
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        factor = torch.rsqrt(variance + norm.eps)
        shift = torch.zeros_like(mean)
        if norm.weight is not None:
            factor = factor * norm.weight.double()
        if norm.bias is not None:
            shift = norm.bias.double()
        if isinstance(layer, FewBitLayer):
            layer.absorb(factor, shift - mean * factor)
            return
        weight: Tensor = stored_weight(layer)
        bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.double()
        folded = (weight.double() * _beside(factor, layer)).to(weight.dtype)
        if only_masked(layer):
            layer.parametrizations["weight"].original = nn.Parameter(folded, requires_grad=weight.requires_grad)
        else:
            layer.weight = nn.Parameter(folded, requires_grad=weight.requires_grad)
        layer.bias = nn.Parameter(((bias - mean) * factor + shift).to(weight.dtype))


def neutralize(norm: Any) -> None:
    """Makes an evaluating batch norm do nothing, where it cannot be taken out because it also holds an activation."""
    with torch.no_grad():
        norm.running_mean.zero_()
        norm.running_var.fill_(1.0 - norm.eps)
        if norm.weight is not None:
            norm.weight.fill_(1.0)
        if norm.bias is not None:
            norm.bias.zero_()


def _beside(factor: Tensor, layer: Any) -> Tensor:
    """(O,) shaped to stand beside the layer's weight."""
    if isinstance(
        layer, _ConvTransposeNd
    ):  # weight (I, O / groups, ...): output channel = group * (O / groups) + column
        groups = factor.reshape(layer.groups, 1, -1)  # (G, 1, O / G)
        rows = groups.expand(-1, layer.in_channels // layer.groups, -1).reshape(layer.in_channels, -1)  # (I, O / G)
        return rows.reshape(*rows.shape, *(1,) * (layer.weight.dim() - 2))
    return factor.reshape(-1, *(1,) * (layer.weight.dim() - 1))


def fold_all(graph: fx.GraphModule) -> list[str]:
    """Folds every batch norm that can be, and takes them out of the graph, with views around them that undo each other.
    Returns the paths of the norms."""
    pairs = foldable(graph)
    if pairs:
        keep_reads(graph)
    norms = {norm for _, norm in pairs}
    for layer, norm in pairs:
        fold(graph.get_submodule(layer), graph.get_submodule(norm))
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and node.target in norms:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    if norms:
        graph.delete_all_unused_submodules()
    drop_undone_views(graph)
    return sorted(norms)
