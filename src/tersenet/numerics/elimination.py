"""Which inputs a layer can do without, when the others make up for them: greedy elimination by second order.

Removing a group of inputs from a linear map costs trace(W_c [(H^-1)_cc]^-1 W_c') of squared error, once the weights of
the other inputs are moved to where they make up best for it: Optimal Brain Surgeon (Hassibi and Stork 1993) with groups
as in ZipLM (Kurtic et al., arXiv:2302.04089), who apply it to the structures of transformers. H is the Gram matrix of
the inputs, so the cost is exact for the layer's own squared error. Departures: several layers that read the same
channels are eliminated together, by the sum of their costs, and one pass gives the order for every width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reader:
    """A linear map that reads the channels.

    Args:
        gram: (I, I) sum of x x' over samples, any positive scale.
        weight: (O, I), in units in which the errors of all readers can be added.
        groups: (n, K) the inputs that belong to each of the n channels.
    """

    gram: Tensor
    weight: Tensor
    groups: Tensor


@dataclass(frozen=True)
class Elimination:
    """Channels in the order of their removal.

    Args:
        order: (n,) the first to go comes first; the last of them never goes.
        errors: (n + 1,) squared error of all readers once 0, 1, ..., n channels are gone, each at the best weights.
        weights: number of channels kept -> weights of the readers, (O, I) each, zero where an input is gone.
    """

    order: list[int]
    errors: list[float]
    weights: dict[int, list[Tensor]]


def eliminate(
    readers: Sequence[Reader], keep: Sequence[int] = (), order: Sequence[int] | None = None, ridge: float = 1e-4
) -> Elimination:
    """Removes one channel after another, each time the one that costs least, in float64.

    Args:
        readers: with the same number of channels, at least one.
        keep: numbers of channels for which the weights are wanted.
        order: remove them in this order instead.
        ridge: relative to the mean of each Gram matrix's diagonal; draws the weights to where they were.
    Cost: O(n I^2 K) per reader.
    """
    count = len(readers[0].groups)
    states = [_State(reader, ridge) for reader in readers]
    alive = torch.ones(count, dtype=torch.bool, device=readers[0].gram.device)
    gone: list[int] = []
    errors, weights = [0.0], {}
    for left in range(count, 0, -1):
        if left in keep:
            weights[left] = [state.weight.clone() for state in states]
        costs = torch.stack([state.costs() for state in states]).sum(dim=0)
        chosen = int(torch.where(alive, costs, torch.inf).argmin()) if order is None else order[len(gone)]
        errors.append(errors[-1] + max(0.0, float(costs[chosen])))
        gone.append(chosen)
        alive[chosen] = False
        for state in states:
            state.remove(chosen)
    return Elimination(gone, errors, weights)


class _State:
    """One reader while its inputs go: the inverse of what is left of its Gram matrix, and its weights by now."""

    def __init__(self, reader: Reader, ridge: float) -> None:
        gram = reader.gram.detach().double()
        strength = ridge * float(gram.diagonal().mean())
        damped = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (strength or 1.0)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        self.weight = reader.weight.detach().double().clone()
        self.groups = reader.groups

    def costs(self) -> Tensor:
        """(n,) for each channel; of channels that are gone it means nothing."""
        blocks = self.inverse[self.groups[:, :, None], self.groups[:, None, :]]  # (n, K, K)
        parts = self.weight[:, self.groups].movedim(0, 2)  # (n, K, O)
        return (parts * torch.linalg.solve(blocks, parts)).sum(dim=(1, 2))

    def remove(self, channel: int) -> None:
        places = self.groups[channel]
        rows = torch.linalg.solve(self.inverse[places][:, places], self.inverse[places])  # (K, I)
        self.weight -= self.weight[:, places] @ rows
        self.inverse -= self.inverse[:, places] @ rows
        # What is gone stays gone: exact zeros, and a block that can be solved.
        self.weight[:, places] = 0.0
        self.inverse[places, :] = 0.0
        self.inverse[:, places] = 0.0
        self.inverse[places, places] = 1.0
