"""A quantized network and the float network that it came from, run side by side on the same images."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from tersenet.bricks.coded import RoundedLayer
from tersenet.bricks.quantized import QuantizedLayer
from tersenet.bricks.quantizer import Quantizer


class SideBySide(fx.Interpreter):
    """Runs every node twice: as the float network does, with the weights that are there, and as the quantized one does.

    Args:
        graph: a trace of the quantized network, in evaluation mode.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.floats: dict[fx.Node, Any] = {}
        self.calls = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")

    def visit(self, node: fx.Node, layer: Any, was: Tensor, now: Tensor) -> None:
        """Called before a quantizer, or a layer that is called once, runs: what it reads in the float network, and now.
        Both networks have run up to it; the float one through it too, so that the layer may be changed."""

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "output":
            return super().run_node(node)
        if node.op == "placeholder":
            value = super().run_node(node)
            self.floats[node] = value.clone()  # operators may work in place
            return value
        was = self._float(node)
        if node.op == "call_module" and isinstance(node.args[0], fx.Node):
            before, layer = node.args[0], self.module.get_submodule(str(node.target))
            if self.calls[node.target] == 1 or isinstance(layer, Quantizer):
                self.visit(node, layer, self.floats[before], self.env[before])
        self.floats[node] = was
        value = super().run_node(node)
        for used in self.user_to_last_uses.get(node, []):
            self.floats.pop(used, None)
        return value

    def _float(self, node: fx.Node) -> Any:
        found: Any = map_arg((node.args, node.kwargs), lambda source: self.floats[source])
        args, kwargs = found
        layer = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, Quantizer):
            return args[0].clone()
        if isinstance(layer, QuantizedLayer | RoundedLayer):
            return float_output(layer, args[0])
        return getattr(self, node.op)(node.target, args, kwargs)


def float_output(layer: Any, x: Tensor) -> Tensor:
    """What a quantized layer would give without rounding."""
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, layer.weight, layer.bias)
    return nn.functional.linear(x, layer.weight, layer.bias)
