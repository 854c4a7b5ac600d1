"""How many bytes weights with zeros take: stored in full, by a bitmap, by distances, and what no code can beat.

Distances between weights that are there, with fillers where one is too far: Han et al., "Deep compression",
arXiv:1510.00149, section 2, where the distance has 8 bits in convolutions and 5 in linear layers; 4 as in EIE
(arXiv:1602.01528). All sizes are without headers, rounded up to whole bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dense(count: int, bits: int) -> int:
    """Every number, zeros too."""
    return math.ceil(count * bits / 8)


def bitmap(there: Tensor, stored: int, bits: int) -> int:
    """A bit for each unit, and the numbers of those that are there.

    Args:
        there: bool, any shape: which units are not all zeros.
        stored: numbers in the units that are there.
        bits: of a number.
    """
    return math.ceil((there.numel() + stored * bits) / 8)


def distances(there: Tensor, stored: int, bits: int, index: int) -> int:
    """The distance from each unit that is there to the one before it, in `index` bits.

    Where it is more than 2^index a filler stands in between: a distance with a unit of zeros.

    Args:
        there: bool, any shape, read in order.
        stored: numbers in the units that are there.
        bits: of a number; index: of a distance, at least 1.
    """
    places = there.flatten().nonzero().flatten()
    if not len(places):
        return 0
    gaps = torch.diff(places, prepend=places.new_tensor([-1]))
    fillers = int(((gaps - 1) // 2**index).sum())
    size = stored / len(places)
    return math.ceil(((len(places) + fillers) * index + (stored + fillers * size) * bits) / 8)


def entropy_bits(values: Tensor) -> float:
    """Bits that no code of single values can beat: n times the entropy of their histogram, zeros among them.

    Args:
        values: any shape, integers.
    """
    counts = values.flatten().unique(return_counts=True)[1].double()
    shares = counts / counts.sum()
    return float(-(counts * shares.log2()).sum())


def foretold(count: float, bits: int, sparsity: float, unit: int) -> float:
    """Bytes of weights that are not there yet: which units are zero, at the entropy of their share, and the numbers of
    the others in full; never more than all of them in full.

    Args:
        count: how many weights there are, zeros too.
        sparsity: share of zeros.
        unit: how many weights go together.

    >>> foretold(800, 8, 0.5, 1), foretold(800, 8, 0.5, 16), foretold(800, 8, 0.0, 1)
    (500.0, 406.25, 800.0)
    """
    where = -sum(share * math.log2(share) for share in (sparsity, 1 - sparsity) if share > 0)
    return count / 8 * min(bits, (1 - sparsity) * bits + where / unit)


def bound(there: Tensor, values: Tensor) -> int:
    """Bytes at least for rounded weights: the entropy of which units are there, and of the numbers inside of them.

    Args:
        there: bool, of the units; values: (n,) integers of the units that are there.
    """
    values_bits = entropy_bits(values) if values.numel() else 0.0
    return math.ceil((entropy_bits(there.to(torch.int8)) + values_bits) / 8)
