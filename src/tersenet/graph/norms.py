"""Batch norms that no layer takes over, as in pre-activation networks (He et al., arXiv:1603.05027): what they read.

There a norm and a ReLU stand in front of each convolution, and what they read is a sum that the next block adds to. The
norm is a scale and a shift of each channel, so that where it goes from one grid to another it is one integer operator
in OpenVINO, and the convolution before it can add inside of its kernel. Both need the sum to be rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

# Of a sum, the share of a channel's variance that a step which all channels share may cost, in the mean over channels:
# that of RUINS in quantization/verdicts.py is ten times as much.
_MOST = 0.01
_REACH = 4  # standard deviations of a channel that the grid is taken to reach


def is_fixed_norm(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a batch norm of fixed statistics: a scale and a shift of each channel."""
    if node.op != "call_module":
        return False
    layer = graph.get_submodule(str(node.target))
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None


def fits_one_grid(norm: Any) -> bool:
    """Whether what a batch norm reads can be rounded to one 8-bit grid, by its statistics alone.

    A norm enlarges the channels of little variance, and with them the rounding: they are lost where the step that all
    channels share is large beside them.
    """
    mean, variance = norm.running_mean.detach().double(), norm.running_var.detach().double()
    alive = variance > 0
    if not bool(alive.any()):
        return False
    step = 2 * float((mean.abs() + _REACH * variance.sqrt()).max()) / 255
    lost = (step**2 / 12 / variance[alive]).clamp(max=1)
    return bool(torch.isfinite(lost).all()) and float(lost.mean()) <= _MOST
