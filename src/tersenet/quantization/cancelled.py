"""Places where all that is added up cancels, so that nothing but rounding errors is left.

The mean over what a norm gives is zero. Computed in floats it is not: it is a few billionths, which another order of
the sum changes. A grid of that size would make large integers of them, other ones in each runtime. So such a place
takes the grid of what was added up, on which they are zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from tersenet.bricks.quantizer import Quantizer
from tersenet.graph.points import only_moves

aten = torch.ops.aten

Range = tuple[float, float]
# Of the largest value that is added up: where the whole range is less, a step of an 8-bit grid is less than what a
# float32 sum is off by.
_LEAST = 2.0**-14
_SUMS = {
    aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor, aten.mean.dim, aten.mean.default,
    aten.sum.dim_IntList, aten.sum.default, aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default, aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default,
}  # fmt: skip
_POOLS = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip


def without_rounding_errors(graph: fx.GraphModule, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The ranges, those of rounding errors replaced.

    Args:
        graph: what `Quantize.apply` returned.
        ranges: path of a quantizer -> the lowest and the highest value there.
    """
    found = dict(ranges)
    for node in graph.graph.nodes:
        if not _is_quantizer(graph, node) or str(node.target) not in found or not _adds(graph, node.args[0]):
            continue
        added = [_range_of(graph, source, found) for source in node.args[0].all_input_nodes]
        known = [each for each in added if each is not None]
        if not known or len(known) < len(added):
            continue
        largest = max(known, key=_size)
        if _size(found[str(node.target)]) < _LEAST * _size(largest):
            found[str(node.target)] = largest
    return found


def _size(values: Range) -> float:
    return max(abs(values[0]), abs(values[1]))


def _is_quantizer(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), Quantizer)


def _adds(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), _POOLS)
    return node.op == "call_function" and node.target in _SUMS


def _range_of(graph: fx.GraphModule, node: fx.Node, ranges: Mapping[str, Range]) -> Range | None:
    """The range of the quantizer that a value comes from; None where something else is between."""
    while not _is_quantizer(graph, node):
        if not only_moves(graph, node):
            return None
        node = node.all_input_nodes[0]
    return ranges.get(str(node.target))
