"""Rounding of one layer learned by gradients: AdaRound (Nagel et al., arXiv:2004.10568), on grids.

Each weight goes up or down; what is learned is which, so that the layer gives the float layer's outputs on its inputs
of now (equation 25, without the activation function). Departures: scales are those of least squared error weighted by
the inputs, and the best of where learning ends and rounding to nearest is kept, output by output.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from tersenet.bricks.coded import RoundedLayer
from tersenet.bricks.codes import GridCode
from tersenet.bricks.mask import mask_of
from tersenet.bricks.quantized import QuantizedLayer
from tersenet.numerics.grids import Grid, least_squares_scales
from tersenet.numerics.learned_rounding import hard_weight, sharpness, soft_weight, start, undecided
from tersenet.numerics.repaired_rounding import damped, layer_error
from tersenet.quantization.repair import DAMPING, Inputs, repaired

_STEPS, _BATCH, _RATE, _WARM, _REGULARISER = 800, 512, 0.01, 0.2, 0.01


def learned(layer: QuantizedLayer | RoundedLayer, inputs: Inputs, rows: Tensor) -> Tensor:
    """(O, ...) weights as they are stored; the layer's scales are set to fit. Codes without a grid are repaired.

    Args:
        rows: (R, G I), what the layer reads now.
    """
    if isinstance(layer, RoundedLayer) and not isinstance(layer.code, GridCode):
        return repaired(layer, inputs)
    weight = layer.weight.detach()
    grouped = weight.flatten(1).unflatten(0, (len(inputs.gram), -1))  # (G, O, I)
    wanted = inputs.target(grouped).to(weight.dtype)
    grid: Grid = Grid(layer.bits) if isinstance(layer, QuantizedLayer) else cast(GridCode, layer.code).grid
    flat = torch.Size((wanted.shape[:-1].numel(), wanted.shape[-1]))
    importance = damped(inputs.gram, DAMPING).diagonal(dim1=-2, dim2=-1)[..., None, :].expand(wanted.shape)
    scale, zero_point = least_squares_scales(wanted.reshape(flat), grid, importance.reshape(flat))
    scales, zeros = (grid.spread(part, flat).expand(flat).reshape(wanted.shape) for part in (scale, zero_point))
    made = _learn(wanted, scales, zeros, grid, inputs, rows)
    plain = grid.round(wanted.reshape(flat), scale, zero_point).reshape(wanted.shape)
    worse = layer_error(made - wanted, inputs.gram) > layer_error(plain - wanted, inputs.gram)
    made = torch.where(worse[..., None], plain, made).reshape(weight.shape)
    mask = mask_of(layer)
    if mask is not None:
        made = made * mask.mask
    _set(layer, scale, zero_point)
    return made


def _set(layer: Any, scale: Tensor, zero_point: Tensor) -> None:
    if isinstance(layer, QuantizedLayer):
        layer.weight_scale.copy_(scale[:, 0])
        return
    layer.code.scale.copy_(scale)
    if layer.code.zero_point is not None:
        layer.code.zero_point.copy_(zero_point)


def _learn(wanted: Tensor, scales: Tensor, zeros: Tensor, grid: Grid, inputs: Inputs, rows: Tensor) -> Tensor:
    """(G, O, I) on the grid. The loss is the squared error of an output, as a share of the outputs' variance."""
    groups = len(inputs.gram)
    source = torch.Generator().manual_seed(0)
    centre = inputs.mean.flatten().to(rows.dtype) if inputs.centred else torch.zeros_like(rows[0])
    energy = float(layer_error(wanted, inputs.gram).sum()) / len(rows)
    with torch.enable_grad():
        choice = start(wanted, scales).requires_grad_()
        optimiser = torch.optim.Adam([choice], lr=_RATE)
        for step in range(_STEPS):
            progress = step / _STEPS
            batch = rows[torch.randint(len(rows), (_BATCH,), generator=source).to(rows.device)] - centre
            parts = batch.view(_BATCH, groups, -1).movedim(1, 0)  # (G, B, I)
            change = soft_weight(wanted, choice, scales, zeros, grid.low, grid.high) - wanted
            loss = (parts @ change.mT).square().sum() / (_BATCH * max(energy, 1e-12))
            if progress >= _WARM:
                loss = loss + _REGULARISER / choice.numel() * undecided(choice, sharpness(progress, _WARM))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return hard_weight(wanted, choice.detach(), scales, zeros, grid.low, grid.high)
