"""Which modules a graph shows as one node, and which of their calls can be told again as a call of the layer."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersenet.bricks.brick import Brick
from tersenet.bricks.plain import has_hooks

# Layers that are seen as the operators they are made of, whose channels graph/coupling.py can follow.
_FOLLOWED = (
    nn.GLU, nn.PixelUnshuffle, nn.modules.padding._CircularPadNd, nn.Unfold, nn.Fold, nn.Unflatten, nn.Embedding,
    nn.EmbeddingBag, nn.Bilinear, nn.CosineSimilarity, nn.PairwiseDistance, nn.LocalResponseNorm, nn.Softmax2d,
    nn.modules.pooling._MaxUnpoolNd, nn.RNNCellBase,
)  # fmt: skip


def is_leaf(module: nn.Module) -> bool:
    """Whether the graph shows this module as one node: childless torch.nn layers, bricks, parametrized layers."""
    if isinstance(module, Brick):
        return True
    if has_hooks(module) or "forward" in vars(module):
        return False  # it computes what they make of it
    if parametrize.is_parametrized(module):
        return True
    if type(module) is nn.Module:  # a bare holder of parameters, as in an exported program
        return False
    if isinstance(module, _FOLLOWED) or (
        isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) > 1
    ):
        return False
    return type(module).__module__.startswith("torch.nn.modules") and next(module.children(), None) is None


def _casts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


class Calls:
    """Which calls of a model's layers, while it is captured, had one input and one output, and nothing else.

    Only those can be told again as a call of the layer; another argument, or a context that changes what an operator
    computes, would be lost.
    """

    def __init__(self, model: nn.Module) -> None:
        paths: dict[int, str] = {}
        self.first = {  # path -> the first path of the same module
            path: paths.setdefault(id(module), path) for path, module in model.named_modules(remove_duplicate=False)
        }
        self.names = Counter(self.first.values())
        self.made: dict[str, list[bool]] = {}
        self.refills = True  # whether the forward itself makes the tensors that it keeps in dictionaries

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        self.made.clear()
        leaves = [(path, module) for path, module in model.named_modules() if is_leaf(module)]
        handles = [leaf.register_forward_hook(self._hook(path), with_kwargs=True) for path, leaf in leaves]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = [*args, *kwargs.values()]
            named = all(key in ("input", "x") for key in kwargs)
            one = len(given) == 1 and isinstance(given[0], Tensor) and isinstance(output, Tensor) and named
            plain = one and not _casts(output.device.type)
            self.made.setdefault(path, []).append(plain)

        return note

    def plain(self, path: str, key: str) -> bool:
        """Whether the call of a layer that torch knows by this key ("...@2" is the third) was of that kind."""
        made = self.made.get(self.first[path], [])
        if self.names[self.first[path]] != 1:
            return bool(made) and all(made)  # torch counts the calls under each name
        number = int(key.rpartition("@")[2]) if "@" in key else 0
        return number < len(made) and made[number]
