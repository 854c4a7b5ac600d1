"""Makes what methods attached to a model permanent: rounding becomes integers, masks become zeros in the weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from tersenet.bricks.coded import RoundedLayer
from tersenet.bricks.few_bits import FewBitLayer
from tersenet.bricks.learned_quantizer import LearnedQuantizer
from tersenet.bricks.mask import release
from tersenet.bricks.quantized import QuantizedLayer
from tersenet.bricks.quantizer import Quantizer

# What computes with rounded numbers and can be trained.
_KINDS = (QuantizedLayer, RoundedLayer, FewBitLayer, LearnedQuantizer)


def attached(model: nn.Module) -> dict[str, str]:
    """Path -> what is attached there: "parametrized", "quantized", or both. Empty when the model is settled."""
    found = {}
    for path, module in model.named_modules():
        kinds = []
        if parametrize.is_parametrized(module):
            kinds.append("parametrized")
        if isinstance(module, _KINDS):
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
    scales = _input_scales(model)
    done: dict[nn.Module, nn.Module] = {}  # a layer that is used under two names stays one layer
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, _KINDS):
            continue
        if module not in done:
            done[module] = _settled(module, scales)
        brick = done[module]
        if path == "":
            return brick
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, brick)
    return model


def _settled(module: Any, scales: dict[nn.Module, Tensor]) -> nn.Module:
    if isinstance(module, LearnedQuantizer):
        return module.plain()
    return module.settled(scales.get(module)) if isinstance(module, FewBitLayer) else module.settled()


def _input_scales(model: nn.Module) -> dict[nn.Module, Tensor]:
    """Layer of few values -> the scale of the quantizer that it reads, in a graph; a scale that trains is no buffer."""
    found: dict[nn.Module, Tensor] = {}
    if not isinstance(model, fx.GraphModule):
        return found
    modules = dict(model.named_modules(remove_duplicate=False))
    for node in model.graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, FewBitLayer):
            source = node.args[0]
            before = modules.get(str(source.target)) if source.op == "call_module" else None
            if isinstance(before, Quantizer):
                found[layer] = before.scale.detach().abs()
    return found
