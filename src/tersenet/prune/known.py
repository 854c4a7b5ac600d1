"""What is coupled in a model, read once per structure: reading it takes seconds, and a search asks many times."""

from __future__ import annotations

import weakref

from torch import Tensor, nn

from tersenet.graph.coupling import Coupling, coupling

_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], Coupling]] = weakref.WeakKeyDictionary()


def known_coupling(model: nn.Module, example: Tensor) -> Coupling:
    """`graph.coupling.coupling`, remembered for as long as the model lives and keeps its structure."""
    structure = (
        tuple(example.shape),
        *((path, id(module), module.extra_repr()) for path, module in model.named_modules()),
        *((name, id(parameter), tuple(parameter.shape)) for name, parameter in model.named_parameters()),
    )
    found = _FOUND.get(model)
    if found is None or found[0] != structure:
        found = _FOUND[model] = (structure, coupling(model, example))
    return found[1]
