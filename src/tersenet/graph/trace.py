"""Captures a model's forward as a graph, in one place, on torch.export.

`torch.export` gives a flat list of aten operators. What the rest of tersenet wants is a graph whose nodes are the
model's own layers, so the operators of one call of a leaf layer (a torch.nn layer, a brick, a parametrized layer) are
folded back into one `call_module` node. The result is a torch.fx.GraphModule that shares its layers with the model,
keeps their paths, runs, trains and can be exported again; what lies between the layers stays aten operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from tersenet.graph.agreement import check, still_right
from tersenet.graph.capture import Example, attributes_kept, capture, inputs_of
from tersenet.graph.layers import Folder


def trace(model: nn.Module, example: Example, permanent: bool = False) -> fx.GraphModule:
    """The model as a graph of its own layers, held against the model (graph/agreement.py).

    Every node has `meta["shape"]` (batch as in `example`, at least 2), `meta["dtype"]` and `meta["path"]`, the
    path of the module whose forward made it. Layers and parameters are shared with `model`, not copied. No operator
    writes into a tensor that another one reads.

    Args:
        permanent: weights that the forward computes from parameters alone, such as standardized ones, are computed
            once and become parameters of the graph, which the model does not have.
    Raises:
        TraceError: when the forward cannot be captured, or the graph would compute something else; says where.
    """
    inputs = inputs_of(example)
    captured = capture(model, example)
    graph = Folder(model, captured.program, captured.calls, permanent).graph_module()
    with attributes_kept(model, captured.calls.refills):  # the model runs here, too
        if captured.again and not still_right(model, graph, inputs):
            captured = capture(model, example, anew=True)
            graph = Folder(model, captured.program, captured.calls, permanent).graph_module()
        check(model, graph, inputs, captured.fixed is None)
    graph.meta["fixed"] = captured.fixed
    return graph


def fixed_batch(graph: fx.GraphModule) -> str | None:
    """Why a traced graph takes one size of batch only, in one sentence; None when it takes any."""
    return graph.meta.get("fixed")


def said_input(example: Example) -> Any:
    """What a plan keeps of a model's input: {"shape", "dtype"}; of several inputs a list of these."""
    if isinstance(example, tuple):
        return [said_input(x) for x in example]
    return {"shape": list(example.shape), "dtype": str(example.dtype).removeprefix("torch.")}


def trace_with(model: nn.Module, said: Any) -> fx.GraphModule:
    """Captures a model with inputs as a plan keeps them (`said_input`), on the model's own device."""
    device = next((p.device for p in model.parameters()), None)
    inputs = tuple(
        torch.zeros(each["shape"], dtype=getattr(torch, each["dtype"]), device=device)
        for each in (said if isinstance(said, list) else [said])
    )
    return trace(model, inputs if isinstance(said, list) else inputs[0])


def has_open_batch(graph: fx.GraphModule) -> bool:
    """Whether a traced graph takes batches of any size; some forwards fix the size that they were captured with."""
    return all(node.meta.get("open", False) for node in graph.graph.nodes if node.op == "placeholder")
