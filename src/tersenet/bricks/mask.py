"""The mask of a layer: which of its weights are there. A parametrization of the layer's `weight`.

The layer keeps the numbers under the mask (`parametrizations.weight.original` in its state dict) and computes with
zeros in their places, so a mask can change, and weights can come back. `Settle` makes the zeros permanent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersenet.bricks.brick import Brick


class Mask(Brick):
    """y = weight where the mask is true, and exactly +0 elsewhere, whatever number lies under it.

    The gradient reaches only what is there, or everything while `regrowing` is set: then the numbers under the mask
    go on learning as if they were there (the update of dynamic network surgery, arXiv:1608.04493, equation 3).

    Buffers: mask, bool, of the weight's shape, which is chosen by `fit` and changed by a ramp; round (), int32, how
    often the ramp of the training that is under way, or was last, has chosen it.

    Args:
        shape: of the weight.
        pattern: what goes together, a name of numerics/patterns.py.
    """

    mask: Tensor
    round: Tensor

    def __init__(self, shape: Sequence[int], pattern: str = "weight") -> None:
        super().__init__()
        self.pattern = pattern
        self.register_buffer("mask", torch.ones(tuple(shape), dtype=torch.bool))
        self.register_buffer("round", torch.zeros((), dtype=torch.int32))
        self.regrowing = False  # only inside one batch of a training
        self._entered: int | None = None  # `round` where this process has seen it, to not wait for a GPU

    def config(self) -> dict[str, Any]:
        return {"shape": list(self.mask.shape), "pattern": self.pattern}

    @property
    def sparsity(self) -> float:
        """The share of zeros, 0 to 1."""
        return 1.0 - float(self.mask.double().mean()) if self.mask.numel() else 0.0

    def forward(self, weight: Tensor) -> Tensor:
        # Not a product: that would give -0 under negative numbers, and NaN under NaN.
        if self.regrowing and torch.is_grad_enabled() and weight.requires_grad:
            return _StraightThrough.apply(weight, self.mask)
        return torch.where(self.mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))

    def enter(self, round: int) -> None:
        """Notes the round of a ramp."""
        self.round.fill_(round)
        self._entered = round

    def entered(self) -> int:
        """The round that was noted last, in another process too."""
        if self._entered is None:
            self._entered = int(self.round)
        return self._entered

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What `layer.weight = ...` stores under the mask."""
        return weight

    def extra_repr(self) -> str:
        return f"shape={tuple(self.mask.shape)}, pattern={self.pattern!r}"


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight.masked_fill(~mask, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def mask_of(layer: nn.Module) -> Mask | None:
    """The layer's mask, or None where it has none."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    chain: Any = layer.parametrizations
    return next((part for part in chain["weight"] if isinstance(part, Mask)), None)


def masked_layers(model: nn.Module) -> Iterator[tuple[str, Any, Mask]]:
    """(path, layer, mask) of the layers that have a mask, in the model's order."""
    for path, module in model.named_modules():
        mask = mask_of(module)
        if mask is not None:
            yield path, module, mask


def masks(model: nn.Module) -> dict[str, Mask]:
    """Path of a layer -> its mask, in the model's order."""
    return {path: mask for path, _, mask in masked_layers(model)}


def attach(layer: Any, pattern: str = "weight") -> Mask:
    """Gives a layer a mask that lets everything through; a layer that has one keeps it, under the new pattern."""
    found = mask_of(layer)
    if found is None:
        found = Mask(layer.weight.shape).to(layer.weight.device)
        parametrize.register_parametrization(layer, "weight", found)
        layer.parametrizations.train(layer.training)
    found.pattern = pattern
    return found


def release(layer: Any, name: str = "weight") -> None:
    """Makes the zeros of a layer's mask permanent and takes the mask away, with whatever else is on the tensor."""
    # A copy of a parametrized layer shares its class, from which torch takes the property away: so the class first.
    kind = type(layer)
    layer.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    parametrize.remove_parametrizations(layer, name, leave_parametrized=True)


def only_masked(layer: nn.Module) -> bool:
    """Whether a mask of the weight is all that is attached to a layer."""
    if mask_of(layer) is None:
        return False
    attached: Any = layer.parametrizations
    return len(attached) == 1 and len(attached["weight"]) == 1


def at_most_masked(layer: Any) -> bool:
    """Whether nothing, or a mask of the weight alone, is attached to a layer."""
    return not parametrize.is_parametrized(layer) or only_masked(layer)


def stored_weight(layer: Any) -> nn.Parameter:
    """The parameter that holds a layer's weight: the numbers under the mask where there is one."""
    if parametrize.is_parametrized(layer, "weight"):
        return layer.parametrizations["weight"].original
    return layer.weight
