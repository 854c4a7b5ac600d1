"""Replays a cut on a fresh model: on the model itself, or on its traced graph where sizes must be written anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tersenet.graph.coupling import read
from tersenet.graph.literals import resize
from tersenet.graph.surgery import cut
from tersenet.graph.trace import trace_with


def recut(model: nn.Module, plan: Mapping[str, Any]) -> nn.Module:
    """Carries out what `Coupling.plan` wrote, with no data; use what it returns.

    With "traced" the result is the graph of the model in evaluation mode, which shares its layers, keeps their paths,
    and trains; dropout and stochastic depth that are no layers, and whatever only training uses, are not in it.

    Raises:
        SurgeryError: when the cut does not fit this model; the model is then as it was.
    """
    if "traced" not in plan:
        return cut(model, plan["kept"])
    graph = trace_with(model, plan["traced"])
    known = read(graph, model)
    found = known.rewrites(known.removed(plan["kept"]))
    cut(graph, plan["kept"])
    resize(graph, found)
    return graph
