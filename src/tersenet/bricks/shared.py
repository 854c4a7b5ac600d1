"""Shared values: each weight of a layer is one of a few numbers, which learn. A parametrization of `weight`.

Han, Mao and Dally, "Deep compression", arXiv:1510.00149, section 3: the gradient of a shared value is the sum of the
gradients of the weights that have it. The layer keeps the numbers that were there before
(`parametrizations.weight.original` in its state dict) until `Settle` makes the shared values permanent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersenet.bricks.brick import Brick
from tersenet.numerics.codebooks import summed_gradients


class Shared(Brick):
    """y = book[codes]; with `zero`, code 0 is exactly 0 and does not learn.

        d loss / d book_k = sum over i with codes_i = k of d loss / d y_i

    Parameters: book (K,), float32. Buffers: codes, uint8, of the weight's shape; with `zero` they reach to K.

    Args:
        shape: of the weight.
        values: K, 1 to 255, shared values that learn.
        zero: whether there is a 0 beside them.
    """

    codes: Tensor

    def __init__(self, shape: Sequence[int], values: int, zero: bool = False) -> None:
        super().__init__()
        self.values, self.zero = values, zero
        self.book = nn.Parameter(torch.zeros(values))
        self.register_buffer("codes", torch.zeros(tuple(shape), dtype=torch.uint8))

    def config(self) -> dict[str, Any]:
        return {"shape": list(self.codes.shape), "values": self.values, "zero": self.zero}

    def forward(self, weight: Tensor) -> Tensor:
        book = torch.cat([self.book.new_zeros(1), self.book]) if self.zero else self.book
        return _Pick.apply(book, self.codes.long()).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What `layer.weight = ...` stores beside the shared values, which stay."""
        return weight

    def extra_repr(self) -> str:
        return f"shape={tuple(self.codes.shape)}, values={self.values}, zero={self.zero}"


class _Pick(torch.autograd.Function):
    """book[codes], with the gradient above."""

    @staticmethod
    def forward(ctx: Any, book: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.count = len(book)
        return book[codes]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (codes,) = ctx.saved_tensors
        return summed_gradients(grads[0], codes, ctx.count), None


def share(layer: Any, values: int, zero: bool) -> Shared:
    """Gives a layer shared values, all 0 until they are chosen."""
    found = Shared(layer.weight.shape, values, zero).to(layer.weight.device)
    parametrize.register_parametrization(layer, "weight", found)
    layer.parametrizations.train(layer.training)
    return found


def shared_of(layer: nn.Module) -> Shared | None:
    """The shared values of a layer's weight, or None."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    chain: Any = layer.parametrizations
    return next((part for part in chain["weight"] if isinstance(part, Shared)), None)


def shared_layers(model: nn.Module) -> Iterator[tuple[str, Any, Shared]]:
    """(path, layer, shared values) of the layers that have them, in the model's order."""
    for path, module in model.named_modules():
        found = shared_of(module)
        if found is not None:
            yield path, module, found
