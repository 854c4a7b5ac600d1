"""Which additions close a residual connection (He et al., arXiv:1512.03385).

Operands that come from one tensor by paths with unequal numbers of layers are a branch and the shortcut around it,
whether that is the tensor itself or a projection. A parameter or buffer, a tensor from another input, and parallel
branches of equal depth, as the convolutions that RepVGG merges (Ding et al., arXiv:2101.03697), are none.
"""

from __future__ import annotations

from torch import fx, nn

_PRODUCTS = {"linear", "conv1d", "conv2d", "conv3d", "matmul", "bmm", "mm", "einsum", "scaled_dot_product_attention"}


def is_residual(first: fx.Node, second: fx.Node) -> bool:
    """Whether the sum of two nodes of a graph joins a branch with the shortcut around it."""
    found = _depths(first, second)
    return found is not None and (min(found) == 0 or found[0] != found[1])


def _depths(first: fx.Node, second: fx.Node) -> tuple[int, int] | None:
    """Layers between each of two nodes and the last tensor that both come from; None when there is none."""
    reached: tuple[dict[fx.Node, int], dict[fx.Node, int]] = ({first: 0}, {second: 0})
    waiting = {first, second}
    while waiting:
        node = max(waiting)  # the latest in the graph, so that all of its users between have been seen
        waiting.remove(node)
        if all(node in side for side in reached):
            return reached[0][node], reached[1][node]
        own = _makes(node)
        for source in node.all_input_nodes:
            if source.op == "get_attr" or ("shape" not in source.meta and source.op != "call_function"):
                continue
            for side in reached:
                if node in side:
                    side[source] = min(side[node] + own, side.get(source, side[node] + own))
            waiting.add(source)
    return None


def _makes(node: fx.Node) -> bool:
    """Whether a node is a layer that makes channels out of others."""
    if node.op == "call_module" and isinstance(node.graph.owning_module, nn.Module):
        layer = node.graph.owning_module.get_submodule(str(node.target))
        return hasattr(layer, "in_channels") or hasattr(layer, "in_features")
    packet = getattr(node.target, "overloadpacket", node.target)
    return getattr(packet, "__name__", "") in _PRODUCTS
