"""Whether a layer computes what the torch.nn layer that it derives from computes.

A subclass of a convolution may pad, standardize its weight or normalize its input in a forward of its own. Whoever puts
another layer in its place, reads its weight as that of a convolution, or writes it down by its settings, asks here.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from tersenet.bricks.brick import Brick

# What decides what a layer computes, beside the settings that it keeps as attributes.
_DECIDES = ("forward", "__call__", "_call_impl", "_conv_forward", "_output_padding", "__getattr__", "__getattribute__")


def is_plain(module: nn.Module) -> bool:
    """Whether a module is one of torch.nn, or computes what the one that it derives from does. A brick is none.

    A forward of its own is run once beside torch's, with a small input, and both must make the same calls with the
    same tensors. Hooks and what is patched onto the object count as a forward of its own; parametrizations do not: they
    decide what a weight is, and not what is done with it (`at_most_masked` and others ask for them).
    """
    kind = next((cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn.modules")), nn.Module)
    if kind is nn.Module or isinstance(module, Brick):
        return False
    if (module._forward_hooks or module._forward_pre_hooks) and has_hooks(module):
        return False
    own = type(module)
    if parametrize.is_parametrized(module):
        own = own.__mro__[1]
    before = own.__mro__[: own.__mro__.index(kind)]
    names = (*_DECIDES, *inspect.get_annotations(kind))
    if any(name in vars(module) for name in _DECIDES if name != "__getattr__"):
        return False
    changed = {name for cls in before for name in names if name in vars(cls)}
    return not changed or (changed == {"forward"} and _does_the_same(module, kind))


def is_kind(module: nn.Module, kinds: Any) -> bool:
    """`isinstance`, for layers that compute what these kinds of torch.nn do, and bricks, whose users know them."""
    return isinstance(module, kinds) and (isinstance(module, Brick) or is_plain(module))


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs before or after this module's forward that could change what it gives."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not getattr(hook, "of_tersenet", False) for hook in hooks)


class _Calls(TorchFunctionMode):
    """Writes down which functions of torch are called, and with what."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, list[Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "__get__":  # reading a shape or a type decides nothing that is not seen
            leaves = torch.utils._pytree.tree_leaves((args, sorted((kwargs or {}).items())))
            self.made.append((func, [id(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]))
        return result


def _does_the_same(module: Any, kind: Any) -> bool:
    x = _small_input(module)
    if x is None:
        return False
    seen = []
    was = module.training
    module.training = False
    try:
        for forward in (module.forward, lambda value: kind.forward(module, value)):
            with _Calls() as calls, torch.no_grad():
                result = forward(x)
            seen.append((calls.made, type(result), getattr(result, "shape", None), getattr(result, "dtype", None)))
    except Exception:  # noqa: BLE001 - whatever the user's forward raises, such as another number of arguments
        return False
    finally:
        module.training = was
    return seen[0] == seen[1]


def _small_input(module: Any) -> Tensor | None:
    """An input that a layer takes; None for kinds whose input is not known."""
    like = next((t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))), None)
    if like is None or not like.is_floating_point():
        return None
    if isinstance(module, _ConvNd):
        sides = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return like.new_zeros(1, module.in_channels, *sides)
    if isinstance(module, nn.Linear):
        return like.new_zeros(1, module.in_features)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        ranks = {"BatchNorm1d": (), "BatchNorm2d": (1, 1), "BatchNorm3d": (1, 1, 1)}
        rank = next((ranks[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in ranks), None)
        return None if rank is None else like.new_zeros(2, module.num_features, *rank)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return like.new_zeros(1, *module.normalized_shape)
    if isinstance(module, nn.GroupNorm):
        return like.new_zeros(2, module.num_channels, 1, 1)
    return None
