"""What a model is, apart from its numbers: two models of the same structure are captured as the same graph."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import types
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

_OWN = vars(nn.Module()).keys()
_DEEPEST, _LONGEST = 4, 64  # of containers that are looked through; beyond, an object stands for itself alone
_serials: dict[int, tuple[weakref.ref[Any], int]] = {}
_counter = itertools.count()


def structure(model: nn.Module, inputs: Sequence[Tensor]) -> str:
    """A digest of all that decides how a forward is captured: classes, settings, hooks, sharing, sizes and types.

    The numbers of parameters and buffers do not count. An attribute that cannot be told from another by what it says
    stands for itself alone, so that its model has a structure of its own.
    """
    digest = hashlib.sha256()

    def add(*values: Any) -> None:
        digest.update(repr(values).encode())

    add(torch.get_default_dtype(), [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")])
    add([(tuple(x.shape), x.dtype, x.device) for x in inputs])
    first: dict[int, int] = {}  # objects by their first place: what is shared is part of the structure
    for path, module in model.named_modules(remove_duplicate=False):
        add(path, first.setdefault(id(module), len(first)))
        if isinstance(module, fx.GraphModule):
            add(module.code)
        else:
            settings = [(key, _settled(value)) for key, value in vars(module).items() if key not in _OWN]
            add(serial(type(module)), settings)
        add([serial(hook) for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())])
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            add(name)
            if tensor is not None:
                add(first.setdefault(id(tensor), len(first)), tuple(tensor.shape), tensor.dtype, tensor.device)
    return digest.hexdigest()


def _settled(value: Any, depth: int = 0) -> Any:
    """A setting as something that says all of it: its value where it is plain, else which object it is."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return repr(value)
    if depth < _DEEPEST and isinstance(value, list | tuple | set | frozenset) and len(value) <= _LONGEST:
        return [type(value).__name__, *[_settled(item, depth + 1) for item in value]]
    if depth < _DEEPEST and isinstance(value, dict) and len(value) <= _LONGEST:
        return [type(value).__name__, *[(repr(key), _settled(item, depth + 1)) for key, item in value.items()]]
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
        return (type(value).__name__, serial(value))
    if isinstance(value, Tensor):
        # Made in inference mode (a cache that a forward fills), it does not count its changes: it is what it holds.
        return ("Tensor", _content(value) if value.is_inference() else (serial(value), value._version))
    # Other objects can be changed in place: they are what they hold.
    if depth < _DEEPEST and not isinstance(value, nn.Module) and (held := getattr(value, "__dict__", None)):
        return [serial(type(value)), _settled(held, depth + 1)]
    return (type(value).__name__, serial(value))


def _content(value: Tensor) -> tuple[Any, ...]:
    raw = value.clone().cpu().flatten().view(torch.uint8).numpy().tobytes()
    return tuple(value.shape), value.dtype, hashlib.sha256(raw).hexdigest()


def serial(value: Any) -> int:
    """A number that this object alone has; one that cannot be told apart later gets another each time."""
    known = _serials.get(id(value))
    if known is not None and known[0]() is value:
        return known[1]
    number = next(_counter)
    with contextlib.suppress(TypeError):
        _serials[id(value)] = (weakref.ref(value), number)
    return number
