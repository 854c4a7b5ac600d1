"""What codes share, chosen for the weights alone: scales, codebooks, exponents of least squared error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersenet.bricks.codes import BasesCode, BookCode, Code, FloatCode, GridCode, PieceCode, PowerCode, TernaryCode
from tersenet.numerics.binary import fitted_scales, greedy_bases, shifted_bases
from tersenet.numerics.codebooks import optimal_codebook
from tersenet.numerics.float_formats import float_scale
from tersenet.numerics.grids import extremes, least_squares_scales
from tersenet.numerics.powers_of_two import exponents
from tersenet.numerics.product_quantization import product_codebooks
from tersenet.numerics.ternary import twn_exact


@torch.no_grad()
def fit_code(code: Code, weight: Tensor, ranges: str = "mse", importance: Tensor | None = None) -> None:
    """Chooses what codes of a weight share.

    Args:
        importance: >= 0, of a shape that broadcasts to the weight; None: all equal. Floats, powers of two and binary
            bases do without.
    """
    if isinstance(code, GridCode):
        choose: Any = extremes if ranges == "minmax" else lambda w, g: least_squares_scales(w, g, importance)
        scale, zero_point = choose(weight, code.grid)
        code.scale.copy_(scale)
        if code.zero_point is not None:
            code.zero_point.copy_(zero_point)
    elif isinstance(code, FloatCode):
        if code.scale is not None:
            code.scale.copy_(float_scale(weight, code.format))
    elif isinstance(code, BookCode):
        code.codebook.copy_(_codebook(weight, len(code.codebook), importance))
    elif isinstance(code, PowerCode):
        code.top.fill_(exponents(weight, code.bits)[1])
    elif isinstance(code, TernaryCode):
        threshold, scale = twn_exact(weight, importance)
        code.threshold.copy_(threshold)
        code.scale.copy_(scale)
    elif isinstance(code, BasesCode):
        code.scales.copy_(_bases(weight, code))
    else:
        assert isinstance(code, PieceCode)
        code.codebooks.copy_(_pieces(weight, code, importance))


def _codebook(weight: Tensor, count: int, importance: Tensor | None) -> Tensor:
    """(k,) rising. Where weights are exactly zero, as pruned ones are, one value is zero."""
    zeros = weight == 0
    if count > 1 and bool(zeros.any()) and not bool(zeros.all()):
        heavy = None if importance is None else importance.expand_as(weight)[~zeros]
        found = optimal_codebook(weight[~zeros], count - 1, heavy)
        found = torch.cat([found, found.new_zeros(1)]).sort().values
    else:
        found = optimal_codebook(weight, count, importance)
    # Fewer distinct weights than values: the last one again, which nothing is nearer to.
    return torch.cat([found, found[-1:].expand(count - len(found))])


def _bases(weight: Tensor, code: BasesCode) -> Tensor:
    """(M, O) scales: ABC-Net's or those of network sketching, whichever rounds better, output by output."""
    best, least = None, None
    for bases, scales in (shifted_bases(weight, code.count), greedy_bases(weight, code.count, rounds=10)):
        for found in (scales, fitted_scales(weight, bases)):
            code.scales.copy_(found)
            error = (code.round(weight) - weight).square().flatten(1).sum(dim=1)
            if best is None or least is None:
                best, least = found, error
            else:
                best, least = torch.where(error < least, found, best), torch.minimum(error, least)
    assert best is not None
    return best


def _pieces(weight: Tensor, code: PieceCode, importance: Tensor | None) -> Tensor:
    heavy = None if importance is None else importance.expand_as(weight).flatten(1)
    return product_codebooks(weight.flatten(1), code.length, code.count, 0, code.shared, heavy)[0]
