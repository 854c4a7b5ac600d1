"""Opens a model for compression: wrappers off, norms of weights permanent, layers with own forwards taken apart.

A subclass of a convolution that pads, standardizes its weight or normalizes its input is no convolution to any method.
What it computes is one, on what goes before: the captured graph has that convolution as a plain layer of the same name,
with its weight computed once where it does not depend on the input. Where such a layer is found the graph takes the
model's place; other models stay what they are.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from tersenet.bricks.brick import Brick
from tersenet.bricks.opened import make_permanent, unwrapped
from tersenet.bricks.plain import is_plain
from tersenet.errors import MadePermanent, TraceError
from tersenet.graph.capture import Example
from tersenet.graph.trace import trace

_KINDS = (_ConvNd, nn.Linear, _BatchNorm, nn.GroupNorm, nn.LayerNorm)


def opened(model: nn.Module, example: Example) -> nn.Module:
    """The model as every step wants it; use what it returns. It computes the same in evaluation mode.

    Warns MadePermanent with what was done; does nothing the second time.

    Args:
        model: is changed in place; give a copy where it is to stay what it was.
        example: (N, ...), or a tuple of all inputs.
    """
    model = unwrapped(model)
    said = make_permanent(model)
    own = [path for path, module in model.named_modules() if _has_own_forward(module)]
    if own and not isinstance(model, fx.GraphModule):
        model, more = _taken_apart(model, own, example)
        said += more
    for line in said:
        warnings.warn(line, MadePermanent, stacklevel=3)
    return model


def _has_own_forward(module: Any) -> bool:
    """Whether a convolution or linear layer computes in its own way, or a norm holds other layers with numbers."""
    if isinstance(module, Brick) or not isinstance(module, _KINDS):
        return False
    holds = any(child.state_dict() for name, child in module.named_children() if name != "parametrizations")
    return (holds or isinstance(module, _ConvNd | nn.Linear)) and not is_plain(module)


def _taken_apart(model: nn.Module, own: list[str], example: Example) -> tuple[nn.Module, list[str]]:
    """The graph of a model, if it knows more plain layers than the model does, and what to say about it."""
    try:
        graph = trace(model, example, permanent=True)
    except TraceError:
        return model, []  # steps that need the graph will say why; the others leave these layers alone
    plain = {path for path, module in graph.named_modules() if isinstance(module, _KINDS)}
    found = [path for path in own if path in plain]
    if not found:
        return model, []
    kinds = sorted({type(model.get_submodule(path)).__name__ for path in found})
    shown = ", ".join(found) if len(found) <= 3 else f"{len(found)} layers ({found[0]}, ..., {found[-1]})"
    return graph, [f"{shown} ({', '.join(kinds)}) with a forward of its own is taken apart into plain layers"]
