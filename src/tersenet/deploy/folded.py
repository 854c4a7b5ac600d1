"""The graph that the exports start from."""

from __future__ import annotations

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from tersenet.bricks.opened import copied, make_permanent
from tersenet.bricks.settle import settle
from tersenet.errors import TraceError
from tersenet.graph.capture import Example
from tersenet.graph.fold import fold_all
from tersenet.graph.trace import fixed_batch, trace


def folded_graph(model: nn.Module, example: Example) -> fx.GraphModule:
    """The model's graph in evaluation mode, norms folded and bricks settled; the model is left as it was.

    Raises:
        TraceError: when the forward cannot be captured.
    """
    own = copied(model).eval()
    make_permanent(own)
    graph = trace(own, example)
    if (fixed := fixed_batch(graph)) is not None:
        raise TraceError(fixed)
    fold_all(graph)
    settle(graph)
    return graph


def with_half_weights(model: nn.Module, example: Example) -> fx.GraphModule:
    """`folded_graph` with the weights of convolutions and linear layers rounded to 16 bits, kept as float32."""
    graph = folded_graph(model, example)
    for layer in graph.modules():
        if isinstance(layer, _ConvNd | nn.Linear):
            layer.weight.data = layer.weight.detach().half().float()
    return graph
