"""How much each width of each bundle hurts, one at a time: divergence from the original's outputs.

A cut whose readers make up for it gives the same as the uncut model with zeros in the readers' weights, so nothing is
cut: the readers' weights are exchanged, and only what comes after the first of them runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersenet.graph.coupling import Bundle, Coupling
from tersenet.numerics.divergence import divergence
from tersenet.numerics.outputs import joined
from tersenet.numerics.samples import Inputs, in_parts
from tersenet.pruning.reconstruction import losses

_CHUNK = 64  # images that run together: their activations stay in the processor's cache


def divergences(
    known: Coupling,
    bundles: Sequence[Bundle],
    sizes: Sequence[Sequence[int]],
    orders: Sequence[Sequence[int] | None],
    twin: fx.GraphModule,
    calibration: Inputs,
    images: Inputs,
    advance: Callable[[int], None] = lambda count: None,
) -> list[dict[int, float] | None]:
    """Per bundle: number of its channels kept -> divergence (numerics/divergence.py); None where it must be tried out.

    Args:
        sizes: per bundle, the numbers to try.
        orders: per bundle, the order in which its channels go; None finds the best.
        twin: of `reconstruction.folded`.
        calibration: (N, ...) images on which the readers make up for what is gone.
        images: (N, ...) images on which the outputs are compared.
        advance: told after each bundle that is not to be tried out.
    """
    found = losses(known, bundles, twin, calibration, sizes, orders)
    places = {node: i for i, node in enumerate(twin.graph.nodes)}
    suffixes = Suffixes(twin, images)
    result: list[dict[int, float] | None] = [None] * len(found)
    known_ones = [(i, lost) for i, lost in enumerate(found) if lost is not None]
    for i, lost in sorted(known_ones, key=lambda entry: places[entry[1].first]):
        curve = {}
        for size in sizes[i]:
            weights = {
                path: weight.to(torch.float32).view_as(twin.get_submodule(path).weight)  # type: ignore[arg-type]
                for path, weight in zip(lost.readers, lost.found.weights[size], strict=True)
            }
            curve[size] = suffixes.divergence(lost.first, weights)
        result[i] = curve
        advance(1)
    return result


def compared(original: nn.Module, changed: nn.Module, images: Inputs) -> float:
    """Divergence of one evaluating model's outputs from another's."""
    with torch.no_grad():
        pairs = [(original(*part), changed(*part)) for part in in_parts(images, _CHUNK)]
    return divergence(joined([a for a, _ in pairs]), joined([b for _, b in pairs]))


class Suffixes:
    """Runs a graph once from the start, and again from any of its layers with other weights.

    Args:
        graph: in evaluation mode.
        images: (N, ...).
    """

    def __init__(self, graph: fx.GraphModule, images: Inputs) -> None:
        self.graph = graph
        self.nodes = list(graph.graph.nodes)
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        self.parts = [dict(zip(inputs, part, strict=True)) for part in in_parts(images, _CHUNK)]
        self.at = len(inputs)  # the parts hold what is still needed in front of this node
        self.last = {source: i for i, node in enumerate(self.nodes) for source in node.all_input_nodes}
        for node in self.nodes:
            if node.op == "get_attr":  # parameters outside of layers are fetched once and kept
                self.last[node] = len(self.nodes)
        self.original = self._outputs(self.parts)

    def divergence(self, first: fx.Node, weights: Mapping[str, Tensor]) -> float:
        """numerics.divergence from the original's outputs to those with other weights in some layers.

        Args:
            first: the first of these layers in the graph; not before that of the last call.
            weights: path -> weight.
        """
        end = self.nodes.index(first)
        self.parts = [self._go(part, self.at, end) for part in self.parts]
        self.at = end
        old: dict[str, Any] = {path: self.graph.get_submodule(path).weight for path in weights}
        try:
            for path, weight in weights.items():
                self.graph.get_submodule(path).weight = torch.nn.Parameter(weight, requires_grad=False)
            found = self._outputs(self.parts)
        finally:
            for path, weight in old.items():
                self.graph.get_submodule(path).weight = weight
        return divergence(self.original, found)

    def _outputs(self, parts: Sequence[dict[fx.Node, Any]]) -> list[Tensor]:
        """(N, ...) each, from copies of what is held, because an operator may write into its input."""
        found = []
        for part in parts:
            copied = {node: value.clone() if isinstance(value, Tensor) else value for node, value in part.items()}
            found.append(self._go(copied, self.at, len(self.nodes))[self.nodes[-1]])
        return joined(found)

    @torch.no_grad()
    def _go(self, values: dict[fx.Node, Any], start: int, end: int) -> dict[fx.Node, Any]:
        """What is still needed in front of node `end`."""
        values = dict(values)
        run = fx.Interpreter(self.graph, garbage_collect_values=False)
        run.env = values
        for i in range(start, end):
            node = self.nodes[i]
            values[node] = run.run_node(node)
            for source in node.all_input_nodes:
                if self.last[source] == i:
                    values.pop(source, None)
        return values
