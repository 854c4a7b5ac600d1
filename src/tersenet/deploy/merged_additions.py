"""Convolutions that add inside of their kernel: which roundings a runtime then leaves out, and what it computes.

TensorRT is given a file without those roundings (`tensorrt.py`). OpenVINO 2026 leaves them out by itself: a rounded
result that goes into an addition alone is still clipped to the ends of its grid, but no longer rounded to it. Found by
comparing its values with ONNX Runtime's behind each operator of int8 files, on one processor; no document says so.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, fx, nn

from tersenet.bricks.quantized import Int8Layer
from tersenet.bricks.quantizer import Quantizer
from tersenet.deploy.folded import folded_graph
from tersenet.graph.points import constants, is_addition


def rounded_for_addition(graph: fx.GraphModule, kind: type[nn.Module]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Of each addition, the first input that is a rounded result of a quantized layer and goes nowhere else.

    Args:
        kind: the type of the modules that round.
    Returns:
        Pairs of nodes: what rounds, and the layer.
    """
    for node in list(graph.graph.nodes):
        if not is_addition(node):
            continue
        for source in node.all_input_nodes:
            if not _is(graph, source, kind) or len(source.users) != 1:
                continue
            layer = source.args[0]
            assert isinstance(layer, fx.Node)
            if _is(graph, layer, Int8Layer) and len(layer.users) == 1:
                yield source, layer
                break


def as_openvino_adds(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """What OpenVINO computes for an int8 model: clipped, not rounded, where a convolution takes over an addition.

    Args:
        model: any module of one input; quantized by us or not. It is left as it was.
        example: (N, ...); only its shape and type are used.
    Raises:
        TraceError: when the forward cannot be captured.
    """
    return merge_additions(folded_graph(model, example))


def merge_additions(graph: fx.GraphModule) -> fx.GraphModule:
    """The same on a captured graph with folded norms, in place."""
    fixed = constants(graph.graph.nodes)
    for node, _ in rounded_for_addition(graph, Quantizer):
        if any(source in fixed for user in node.users for source in user.all_input_nodes):
            continue  # a constant is added behind the rounding
        quantizer = graph.get_submodule(str(node.target))
        assert isinstance(quantizer, Quantizer)
        scale, zero = float(quantizer.scale), int(quantizer.zero_point)
        ends = ((quantizer.low - zero) * scale, (quantizer.high - zero) * scale)
        graph.add_submodule(str(node.target), nn.Hardtanh(*ends))
    graph.recompile()
    return graph


def _is(graph: fx.GraphModule, node: fx.Node, kind: type[nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), kind)
