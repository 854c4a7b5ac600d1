"""Rounding of one layer with its inputs in view: what it should give, and rounded weights that give it.

The errors of the layers before are part of the inputs, so a layer is first moved to where it gives the float layer's
outputs on them (least squares), and then rounded: column by column, then weight by weight, with the shared values
fitted in between (numerics/repaired_rounding.py), or with rounding learned by gradients (AdaRound).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tersenet.bricks.coded import RoundedLayer
from tersenet.bricks.codes import BasesCode, BookCode, Code, FloatCode, GridCode, PieceCode, TernaryCode
from tersenet.bricks.mask import mask_of
from tersenet.bricks.quantized import QuantizedLayer
from tersenet.numerics.float_formats import round_float
from tersenet.numerics.grids import Grid
from tersenet.numerics.refit_shared import refit_shared
from tersenet.numerics.repaired_rounding import (
    Nearest,
    damped,
    descend,
    keeping,
    layer_error,
    round_columns,
    round_to_grid,
)
from tersenet.quantization.nearest import fit_code

# Of the mean of a Gram matrix's diagonal.
DAMPING = 0.01
_TURNS = 3


@dataclass(frozen=True)
class Inputs:
    """What a layer reads, of the float network and now, in float64; G groups of a convolution, R rows.

    Attributes:
        gram: (G, I, I) sum of x x' now, around the mean where `centred`.
        cross: (G, I, I) sum of (float x) x' likewise.
        float_mean, mean: (G, I).
        centred: whether a bias or a norm takes care of the mean.
    """

    gram: Tensor
    cross: Tensor
    float_mean: Tensor
    mean: Tensor
    centred: bool

    @classmethod
    def of(cls, float_rows: Tensor, rows: Tensor, groups: int, centred: bool) -> Inputs:
        """Both (R, G I)."""
        width = rows.shape[1] // groups
        gram = torch.zeros(groups, width, width, dtype=torch.float64, device=rows.device)
        cross = torch.zeros_like(gram)
        float_mean, mean = (part.double().mean(dim=0).view(groups, width) for part in (float_rows, rows))
        # Products of a few thousand rows in float32, which is several times faster, summed in float64.
        for a, b in zip(float_rows.split(2048), rows.split(2048), strict=True):
            was, now = (part.view(-1, groups, width).movedim(1, 0) for part in (a, b))  # (G, r, I)
            if centred:
                was, now = was - float_mean[:, None].to(was.dtype), now - mean[:, None].to(now.dtype)
            gram += (now.mT @ now).double()
            cross += (was.mT @ now).double()
        return cls(gram, cross, float_mean, mean, centred)

    def target(self, weight: Tensor) -> Tensor:
        """(G, O, I) the weight that gives now what `weight` gave in the float network, by damped least squares."""
        pull = weight.double() @ (self.cross - self.gram)
        hessian = damped(self.gram, DAMPING)
        return weight.double() + torch.linalg.solve(hessian, pull, left=False)

    def shift(self, weight: Tensor, rounded: Tensor) -> Tensor:
        """(O,) by how much the mean of the outputs is too low now; (G, O, I) each."""
        wanted = (weight.double() @ self.float_mean[..., None])[..., 0]
        return (wanted - (rounded.double() @ self.mean[..., None])[..., 0]).flatten()


def repaired(layer: QuantizedLayer | RoundedLayer, inputs: Inputs, moved: bool = True) -> Tensor:
    """(O, ...) weights as they are stored, by columns; the layer's shared values are set to fit.

    Args:
        moved: whether the errors of the layers before are taken back as well.
    """
    weight = _grouped(layer.weight.detach(), inputs)
    wanted = inputs.target(weight).to(weight.dtype) if moved else weight
    keep = _kept(layer, inputs)
    if isinstance(layer, QuantizedLayer):
        grid = Grid(layer.bits)
        made, scale, _ = round_to_grid(wanted * keep, inputs.gram, grid, DAMPING, keep=keep)
        layer.weight_scale.copy_(scale[:, 0])
    elif isinstance(layer.code, GridCode):
        made, scale, zero_point = round_to_grid(wanted * keep, inputs.gram, layer.code.grid, DAMPING, keep=keep)
        layer.code.scale.copy_(scale)
        if layer.code.zero_point is not None:
            layer.code.zero_point.copy_(zero_point)
    elif isinstance(layer.code, PieceCode):
        flat = wanted.reshape(layer.weight.shape)
        importance = _diagonal(inputs, wanted).reshape(layer.weight.shape)
        fit_code(layer.code, flat, importance=importance)
        made = layer.code.round(flat)
    else:
        made = _by_columns(layer.code, wanted, inputs, keep)
    return made.reshape(layer.weight.shape)


def _grouped(weight: Tensor, inputs: Inputs) -> Tensor:
    """(O, ...) -> (G, O / G, I)."""
    return weight.flatten(1).unflatten(0, (len(inputs.gram), -1))


def _kept(layer: Any, inputs: Inputs) -> Tensor:
    """(G, O / G, I): 1 where a mask lets a weight be, else 0."""
    mask = mask_of(layer)
    weight = layer.weight.detach()
    return _grouped(torch.ones_like(weight) if mask is None else mask.mask.to(weight.dtype), inputs)


def _diagonal(inputs: Inputs, like: Tensor) -> Tensor:
    return damped(inputs.gram, DAMPING).diagonal(dim1=-2, dim2=-1)[..., None, :].expand(like.shape)


def _by_columns(code: Code, wanted: Tensor, inputs: Inputs, keep: Tensor) -> Tensor:
    """(G, O, I) for codes whose values are a table or short floats: shared values and weights in turns."""
    wanted = wanted * keep
    flat = wanted.reshape(code.shape)
    fit_code(code, flat, importance=_diagonal(inputs, wanted).reshape(code.shape))
    hessian = damped(inputs.gram, DAMPING)
    plain = code.round(flat).reshape(wanted.shape) * keep
    nearest = keeping(_nearest(code, wanted.shape), keep)
    made = round_columns(wanted, inputs.gram, nearest, DAMPING)
    # Column by column is greedy: for a row now and then plain rounding is the better start.
    worse = layer_error(made - wanted, hessian) > layer_error(plain - wanted, hessian)
    made = torch.where(worse[..., None], plain, made)
    for turn in range(_TURNS):
        made = descend(wanted, made, inputs.gram, nearest, DAMPING)
        again = _refit(code, wanted, made, inputs) if turn < _TURNS - 1 else None
        if again is None:
            break
        made = again * keep
        nearest = keeping(_nearest(code, wanted.shape), keep)
    return made


def _nearest(code: Code, shape: torch.Size) -> Nearest:
    """What the weights of a column may be."""
    if isinstance(code, FloatCode):
        beside = 1.0 if code.scale is None else code.scale.double().view(shape[:2])
        return lambda values, column: round_float(values / beside, code.format) * beside
    table = code.table().double()  # type: ignore[operator]
    if len(table) == 1:
        middles = (table[0, 1:] + table[0, :-1]) / 2
        return lambda values, column: table[0][torch.bucketize(values.contiguous(), middles)]
    rows = table.view(*shape[:2], -1)  # (G, O, k)

    def nearest(values: Tensor, column: int) -> Tensor:
        place = (values[..., None] - rows).abs().argmin(dim=-1, keepdim=True)
        return rows.gather(-1, place)[..., 0]

    return nearest


def _refit(code: Code, wanted: Tensor, made: Tensor, inputs: Inputs) -> Tensor | None:
    """Moves the shared values to where they are best for the codes of `made`; the weights of these codes then, or None
    where nothing is shared that could be moved."""
    flat = made.reshape(code.shape)
    if isinstance(code, BookCode):
        design = F.one_hot(code.encode(flat).long(), len(code.codebook)).view(*wanted.shape, -1)
        found = refit_shared(wanted, design, inputs.gram, code.codebook[None], DAMPING)
        found = torch.where(code.codebook == 0, 0.0, found)  # of pruned weights
        code.codebook.copy_(found[0].sort().values)
    elif isinstance(code, TernaryCode):
        design = (code.encode(flat).long() - 1).view(*wanted.shape, 1)
        found = refit_shared(wanted, design, inputs.gram, code.scale[:, None], DAMPING)
        found = torch.where(found > 0, found, code.scale[:, None])
        code.scale.copy_(found[:, 0])
        code.threshold.copy_(found[:, 0] / 2)
    elif isinstance(code, BasesCode):
        design = code.signs(flat).view(*wanted.shape, -1)
        found = refit_shared(wanted, design, inputs.gram, code.scales.T, DAMPING)
        code.scales.copy_(found.T)
    else:
        return None
    rows = found.expand(code.shape[0], -1)[..., None]  # (O', M, 1)
    values = design.to(found.dtype).reshape(code.shape[0], -1, found.shape[1])  # (O', I, M)
    return (values @ rows)[..., 0].reshape(wanted.shape)
