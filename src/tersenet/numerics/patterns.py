"""Patterns of zeros: which weights of a layer go together, what a group of them is worth, and masks from groups.

    weight   single weights
    row      a row of a kernel, 1 x K          column   a column of a kernel, K x 1 (vectors of Mao et al.,
                                                        arXiv:1705.08922)
    kernel   a whole K x K kernel              filter   all kernels of an output channel
    16x1     blocks of 16 output channels x 1 input channel at one kernel position; any other "AxB" likewise: the
             pattern of vector registers (a sparse kernel then works on full ones)
    2:4      at most 2 weights in 4 that follow one another along the input channels, at one output channel and kernel
             position, the layout of sparse tensor cores (Mishra et al., arXiv:2104.08378); any other "N:M" likewise

Weights are (O, I, ...), output channels first; a linear layer and a 1x1 convolution have kernels of one weight. Where
a size is no multiple of the block's, the last blocks are smaller, as if the rest were zeros that cost nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tersenet.errors import SettingsError

NAMES = ("weight", "row", "column", "kernel", "filter")


@dataclass(frozen=True)
class Pattern:
    """What goes together.

    Args:
        name: as in recipes.
        block: (A, B) of "AxB".
        group: (N, M) of "N:M": N weights of M may stay. Its units are single weights.
    """

    name: str
    block: tuple[int, int] | None = None
    group: tuple[int, int] | None = None

    @property
    def highest(self) -> float:
        """The highest sparsity that the pattern asks for: 1 - N/M for "N:M", else 1."""
        return 1.0 if self.group is None else 1.0 - self.group[0] / self.group[1]

    def unit(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """How many weights a unit spans in each dimension of a weight.

        >>> parse("16x1").unit((64, 32, 3, 3)), parse("kernel").unit((64, 32, 3, 3)), parse("column").unit((8, 4))
        ((16, 1, 1, 1), (1, 1, 3, 3), (1, 1))
        """
        inside = shape[2:]
        ones = (1,) * len(inside)
        if self.block is not None:
            return (*self.block, *ones)
        if self.name == "filter":
            return (1, *shape[1:])
        if self.name == "kernel":
            return (1, 1, *inside)
        if self.name == "row" and inside:
            return (1, 1, *ones[1:], inside[-1])
        if self.name == "column" and len(inside) > 1:
            return (1, 1, *ones[2:], inside[-2], 1)
        return (1, 1, *ones)


def parse(name: str) -> Pattern:
    """The pattern of a name.

    >>> parse("2:4")
    Pattern(name='2:4', block=None, group=(2, 4))

    Raises:
        SettingsError: on a name that means nothing.
    """
    if name in NAMES:
        return Pattern(name)
    block, group = re.fullmatch(r"(\d+)x(\d+)", name), re.fullmatch(r"(\d+):(\d+)", name)
    if block and int(block[1]) > 0 and int(block[2]) > 0:
        return Pattern(name, block=(int(block[1]), int(block[2])))
    if group and 0 < int(group[1]) < int(group[2]):
        return Pattern(name, group=(int(group[1]), int(group[2])))
    raise SettingsError(
        f"pattern is {name!r}; it must be one of {', '.join(NAMES)}, a block such as '16x1' (output x input channels), "
        "or N:M such as '2:4' (N of M along the input channels may stay)"
    )


def unit_sums(values: Tensor, pattern: Pattern) -> Tensor:
    """The sum over each unit: (O, I, ...) -> one number per unit, with as many dimensions."""
    unit = pattern.unit(tuple(values.shape))
    padded = _padded(values, unit)
    split: list[int] = []
    for size, step in zip(padded.shape, unit, strict=True):
        split += [size // step, step]
    return padded.reshape(split).sum(dim=tuple(range(1, len(split), 2)))


def expand(units: Tensor, shape: tuple[int, ...], pattern: Pattern) -> Tensor:
    """The inverse of grouping: what holds for a unit holds for each of its weights; (O, I, ...)."""
    for dim, step in enumerate(pattern.unit(shape)):
        if step > 1:
            units = units.repeat_interleave(step, dim)
    return units[tuple(slice(size) for size in shape)]


def protected(scores: Tensor, pattern: Pattern) -> Tensor:
    """Which units must stay whatever they score: the N best of each M of "N:M"; nothing in other patterns.

    Args:
        scores: of units, as `unit_sums` gives them; for "N:M" those of single weights, (O, I, ...).
    Returns:
        bool of the same shape. Of equal scores the first stay.
    """
    if pattern.group is None:
        return torch.zeros_like(scores, dtype=torch.bool)
    stay, width = pattern.group
    inputs = scores.movedim(1, -1)  # (O, ..., I)
    missing = -inputs.shape[-1] % width
    groups = F.pad(inputs, (0, missing), value=-torch.inf).unflatten(-1, (-1, width))
    order = groups.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, order[..., :stay], True)
    return kept.flatten(-2)[..., : inputs.shape[-1]].movedim(-1, 1)


def can_lose(shape: tuple[int, ...], pattern: Pattern) -> bool:
    """Whether a weight of this shape has something that the pattern could take out, and something left then."""
    if pattern.group is not None:
        return shape[1] > pattern.group[0]
    units = 1
    for size, step in zip(shape, pattern.unit(shape), strict=True):
        units *= -(-size // step)
    return units > 1


def _padded(values: Tensor, unit: tuple[int, ...]) -> Tensor:
    """Zeros behind each dimension, up to a multiple of the unit."""
    pads: list[int] = []
    for size, step in reversed(list(zip(values.shape, unit, strict=True))):
        pads += [0, -size % step]
    return F.pad(values, pads) if any(pads) else values
