"""Which channels a cut could not touch, and why: in layers of the model, as a share of its weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from tersenet.graph.coupling import Bundle, Coupling
from tersenet.left_alone import weights_of

RESIDUAL = "pass through a residual addition"
Whys = dict[str, list[tuple[str, float]]]


def standing(model: nn.Module, known: Coupling, why: Callable[[Bundle], str | None]) -> tuple[dict[str, int], Whys]:
    """(path -> weights, path -> [(reason, share of the layer's output channels that stand still for it)]).

    Args:
        why: the reason why a bundle is not cut; None for one that may be.
    """
    reasons: list[str | None] = [None]
    of_class = np.zeros(known.count, dtype=np.int64)
    for bundle in known.bundles:
        reason = why(bundle)
        if reason is not None:
            if reason not in reasons:
                reasons.append(reason)
            of_class[bundle.classes] = reasons.index(reason)
    sizes = weights_of(model)
    makes = {path: classes for (path, role), classes in known.slots.items() if role != "in"}
    makes |= {path: classes for (path, role), classes in known.slots.items() if role == "out"}
    found: Whys = {}
    for path in sizes:
        classes = makes.get(path)
        if classes is None:
            found[path] = [(_unknown(model, path), 1.0)]
            continue
        parts = [(known.frozen.get(path, "meet channels that cannot be cut"), float((classes == 0).mean()))]
        parts += [(text or "", float((of_class[classes] == i).mean())) for i, text in enumerate(reasons) if i]
        if parts := [part for part in parts if part[1] > 0]:
            found[path] = parts
    return sizes, found


def _unknown(model: nn.Module, path: str) -> str:
    try:
        return f"are no layers whose channels are followed, but {type(model.get_submodule(path)).__name__}"
    except AttributeError:
        return "are parameters outside of layers"
