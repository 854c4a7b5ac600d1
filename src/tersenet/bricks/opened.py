"""Takes off a model what others have put around it or its weights: wrappers, and norms that compute weights.

Weight norm, spectral norm and torch's own pruning compute a layer's weight before each call. While a model is
compressed the weight itself is what is cut, rounded and stored, so it is computed once, as in evaluation, and stays.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from tersenet.bricks.brick import Brick
from tersenet.bricks.mask import release
from tersenet.errors import ModelError

# What wraps a model -> where it keeps it.
_WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}


def wrapper(model: nn.Module) -> str | None:
    """The attribute in which a wrapper of torch keeps its model; None for a model itself."""
    return _WRAPPERS.get(type(model).__name__) if type(model).__module__.startswith("torch.") else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DataParallel, DistributedDataParallel and torch.compile.

    Raises:
        ModelError: for TorchScript, whose layers cannot be changed.
    """
    while (name := wrapper(model)) is not None:
        model = getattr(model, name)
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "the model is TorchScript, whose layers cannot be changed; build the model's own class and load the "
            "weights of the script into it, model.load_state_dict(script.state_dict())"
        )
    return model


def need_float32(model: nn.Module, example: Any) -> None:
    """Refuses what is not computed in float32, as files are made, checked and scored.

    Args:
        example: an input, or all of them.
    Raises:
        ModelError: naming the first parameter or input of another precision.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    values = [*model.named_parameters(), *((f"input {i} of the example", x) for i, x in enumerate(inputs))]
    for name, value in values:
        if value.is_floating_point() and value.dtype != torch.float32:
            raise ModelError(
                f"{name} is {str(value.dtype).removeprefix('torch.')}, and files are made and checked in float32; call "
                "model.float() and give float32 inputs (quantize with weights: fp16 makes a file of half the bytes)"
            )


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model whose last call left a computed weight with its history in a layer."""
    with _without_histories(model):
        return copy.deepcopy(model)


def make_permanent(model: nn.Module) -> list[str]:
    """Gives the layers whose weight is computed from others that weight itself, as in evaluation, in place.

    Parametrizations of tersenet's own, such as masks, stay.

    Returns:
        what was done, one line for each kind.
    """
    done: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        for kind in (*_hooked(module), *_parametrized(module)):
            done.setdefault(kind, []).append(path or "the model")
    return [f"{kind} of {_listed(paths)} is made permanent" for kind, paths in done.items()]


def _hooked(module: Any) -> Iterator[str]:
    """The old kinds, which compute the weight in a hook."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
            yield "weight norm"
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
            yield "spectral norm"
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
            yield "torch's own pruning"


def _parametrized(module: Any) -> Iterator[str]:
    if not parametrize.is_parametrized(module):
        return
    for name, chain in list(module.parametrizations.items()):
        if any(isinstance(part, Brick) for part in chain):
            continue
        kinds = {type(part).__name__ for part in chain}
        for part in chain.modules():
            part.training = False  # else a spectral norm would take another step
        release(module, name)
        named = {"_WeightNorm": "weight norm", "_SpectralNorm": "spectral norm", "_Orthogonal": "orthogonality"}
        yield ", ".join(sorted(named.get(kind, f"the parametrization {kind}") for kind in kinds))


def _listed(paths: list[str]) -> str:
    return ", ".join(paths) if len(paths) <= 3 else f"{len(paths)} layers ({paths[0]}, ..., {paths[-1]})"


@contextlib.contextmanager
def _without_histories(model: nn.Module) -> Iterator[None]:
    """A tensor that was computed cannot be copied together with how it was computed; its numbers can."""
    own = vars(nn.Module()).keys()
    held = [
        (vars(module), name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in own and isinstance(value, Tensor) and value.grad_fn is not None
    ]
    for place, name, value in held:
        place[name] = value.detach().clone()
    try:
        yield
    finally:
        for place, name, value in held:
            place[name] = value
