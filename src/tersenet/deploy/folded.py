"""The graph that the exports start from."""

from __future__ import annotations

import copy

from torch import fx, nn

from tersenet.bricks.settle import settle
from tersenet.graph.fold import fold_all
from tersenet.graph.trace import Example, trace


def folded_graph(model: nn.Module, example: Example) -> fx.GraphModule:
    """The model's graph in evaluation mode, norms folded and bricks settled; the model is left as it was.

    Raises:
        TraceError: when the forward cannot be captured.
    """
    graph = trace(copy.deepcopy(model).eval(), example)
    fold_all(graph)
    settle(graph)
    return graph
