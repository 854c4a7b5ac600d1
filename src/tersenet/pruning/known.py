"""What was read off a model, remembered while it stays as it is; reading takes seconds, a search asks often."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import nn

from tersenet.graph.blocks import Blocks, residual_blocks
from tersenet.graph.capture import Example
from tersenet.graph.coupling import Coupling, coupling

T = TypeVar("T")
_FOUND: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Hashable, Any]]] = weakref.WeakKeyDictionary()


def remembered(model: nn.Module, what: str, key: Hashable, make: Callable[[], T]) -> T:
    """What `make` gave when it was last called for this model, `what` and an equal `key`; else what it gives now."""
    found = _FOUND.setdefault(model, {})
    if what not in found or found[what][0] != key:
        found[what] = (key, make())
    return found[what][1]


def structure_of(model: nn.Module, example: Example) -> Hashable:
    """Changes when a layer is exchanged, cut or moved; not when its numbers change."""
    return (
        *(tuple(x.shape) for x in (example if isinstance(example, tuple) else (example,))),
        *((path, id(module), module.extra_repr()) for path, module in model.named_modules()),
        *((name, id(parameter), tuple(parameter.shape)) for name, parameter in model.named_parameters()),
    )


def numbers_of(model: nn.Module) -> Hashable:
    """Changes when a parameter or buffer is written to."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return tuple((name, id(tensor), tensor._version) for name, tensor in tensors)


def known_coupling(model: nn.Module, example: Example) -> Coupling:
    """`graph.coupling.coupling`, remembered."""
    return remembered(model, "coupling", structure_of(model, example), lambda: coupling(model, example))


def known_blocks(model: nn.Module, example: Example) -> Blocks:
    """`graph.blocks.residual_blocks`, remembered."""
    return remembered(model, "blocks", structure_of(model, example), lambda: residual_blocks(model, example))
