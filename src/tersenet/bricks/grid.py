"""A grid under a tensor that trains: each row's numbers are whole multiples of its step. A parametrization.

The layer keeps how many steps each number is, between whole ones too (`parametrizations.weight.original` in its state
dict): there small updates add up, and in units of steps one learning rate suits all layers. It computes with the
nearest multiples. `Settle` makes these permanent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersenet.bricks.brick import Brick


class Grid(Brick):
    """y = step round(x), at most `largest` steps from 0, and exactly +0 where a zero is held.

    The gradient goes through the rounding as if it were not there, dy / dx = step (the straight-through estimator,
    Bengio et al., arXiv:1308.3432), but not to a zero that is held, nor beyond the ends. Where the step is 0, y = x.

    Buffers: step, float32, (O, 1, ...), or (1, ...) for one step in all; kept, bool, of the tensor's shape, false
    where a zero is held.

    Args:
        shape: of the tensor.
        rows: whether each index of the first axis has a step of its own.
        largest: whole steps to either side of 0.
    """

    step: Tensor
    kept: Tensor

    def __init__(self, shape: Sequence[int], rows: bool = True, largest: int = 255) -> None:
        super().__init__()
        self.rows, self.largest = rows, largest
        self.register_buffer("step", torch.zeros([shape[0], *[1] * (len(shape) - 1)] if rows else [1] * len(shape)))
        self.register_buffer("kept", torch.ones(tuple(shape), dtype=torch.bool))

    def config(self) -> dict[str, Any]:
        return {"shape": list(self.kept.shape), "rows": self.rows, "largest": self.largest}

    def forward(self, x: Tensor) -> Tensor:
        return _Nearest.apply(x, self.step, self.kept, self.largest)

    def right_inverse(self, value: Tensor) -> Tensor:
        """What `layer.weight = ...` stores: steps."""
        return torch.where(self.step > 0, value / self.step, value)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.kept.shape)}, rows={self.rows}, largest={self.largest}"


class _Nearest(torch.autograd.Function):
    """The nearest number of the grid, with the gradient above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, kept: Tensor, largest: int) -> Tensor:
        found = torch.where(step > 0, torch.round(x).clamp_(-largest, largest) * step, x)
        ctx.save_for_backward(torch.where(step > 0, step, 1.0) * (kept & (x.abs() <= largest)))
        return torch.where(kept, found, 0.0) + 0.0  # no -0.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return grads[0] * slope, None, None, None


def put_under(layer: Any, name: str, rows: bool) -> Grid:
    """Gives a tensor of a layer a grid that leaves it as it is until steps are chosen."""
    found = Grid(getattr(layer, name).shape, rows).to(getattr(layer, name).device)
    parametrize.register_parametrization(layer, name, found)
    layer.parametrizations.train(layer.training)
    return found


def grids(model: nn.Module) -> Iterator[tuple[str, Any, str, Grid]]:
    """(path, layer, name of the tensor, grid) of what has a grid, in the model's order."""
    for path, layer in model.named_modules():
        if not parametrize.is_parametrized(layer):
            continue
        chains: Any = layer.parametrizations
        for name, chain in chains.items():
            yield from ((path, layer, name, part) for part in chain if isinstance(part, Grid))
