"""The graph that the exports start from."""

from __future__ import annotations

from torch import fx, nn

from tersenet.bricks.opened import copied, make_permanent
from tersenet.bricks.settle import settle
from tersenet.errors import TraceError
from tersenet.graph.fold import fold_all
from tersenet.graph.trace import Example, fixed_batch, trace


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
