"""Makes what methods attached to a model permanent: rounding becomes integers, masks become zeros in the weights."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from tersenet.bricks.coded import RoundedLayer
from tersenet.bricks.mask import release
from tersenet.bricks.quantized import QuantizedLayer


def attached(model: nn.Module) -> dict[str, str]:
    """Path -> what is attached there: "parametrized", "quantized", or both. Empty when the model is settled."""
    found = {}
    for path, module in model.named_modules():
        kinds = []
        if parametrize.is_parametrized(module):
            kinds.append("parametrized")
        if isinstance(module, QuantizedLayer | RoundedLayer):
            kinds.append("quantized")
        if kinds:
            found[path] = "+".join(kinds)
    return found


def unmask(model: nn.Module) -> nn.Module:
    """Makes masks and other parametrizations permanent, in place; rounding stays as it is."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                release(module, name)
    return model


def settle(model: nn.Module) -> nn.Module:
    """Settles a model in place and returns its root, which is another object where the root itself was a brick."""
    unmask(model)
    done: dict[nn.Module, nn.Module] = {}  # a layer that is used under two names stays one layer
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, QuantizedLayer | RoundedLayer):
            continue
        if module not in done:
            done[module] = module.settled()
        brick = done[module]
        if path == "":
            return brick
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, brick)
    return model
