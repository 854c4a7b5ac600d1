"""All outputs of a model, whatever they stand in: flattened, and put together from batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def floats(outputs: Any) -> list[Tensor]:
    """The outputs of floating point, (N, ...) each, in the order in which a model's nested outputs are flattened.

    >>> [tuple(each.shape) for each in floats({"a": torch.zeros(2, 3), "b": (None, torch.zeros(2, 4))})]
    [(2, 3), (2, 4)]
    """
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point() and leaf.ndim]


def joined(parts: Sequence[Any]) -> list[Tensor]:
    """The same of several batches, one behind the other."""
    return [torch.cat(pieces) for pieces in zip(*map(floats, parts), strict=True)]


def without_value(outputs: Any, samples: int) -> Tensor:
    """(samples,): which samples have NaN among their outputs; none where the outputs are not one for each sample.

    >>> without_value(torch.tensor([[1.0, float("nan")], [1.0, float("inf")]]), 2).tolist()
    [True, False]
    """
    found = torch.zeros(samples, dtype=torch.bool)
    for each in floats(outputs):
        if len(each) == samples and each.numel():
            found |= each.isnan().reshape(samples, -1).any(1).cpu()
    return found
