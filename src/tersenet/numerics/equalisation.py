"""Factors that even out the channels between two layers, so that one grid serves all of them.

Nagel et al., "Data-free quantization through weight equalization and bias correction", arXiv:1906.04721, section 4.1.
With f(s x) = s f(x) for s > 0, as of ReLU, dividing output i of the first layer and its bias by s_i and multiplying
input i of the second by it changes nothing. A depthwise layer between two others is the second of one pair and the
first of the next; pairs are repeated until nothing changes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def output_ranges(weight: Tensor) -> Tensor:
    """(O,) largest magnitude of each output channel.

    Args:
        weight: (O, ...).
    """
    return weight.detach().abs().flatten(1).amax(dim=1)


def input_ranges(weight: Tensor, groups: int = 1) -> Tensor:
    """(I,) largest magnitude of what reads each input channel.

    Args:
        weight: (O, I / groups, ...).
        groups: of the convolution; of a depthwise one, all its channels.
    """
    sizes = weight.detach().abs()
    sizes = sizes.flatten(2).amax(dim=2) if sizes.dim() > 2 else sizes  # (O, I / groups)
    return sizes.view(groups, -1, sizes.shape[1]).amax(dim=1).flatten()


def equalisation_factors(first: Tensor, second: Tensor, limit: float = 1e4) -> Tensor:
    """s_i = sqrt(r1_i / r2_i), after which both ranges are sqrt(r1_i r2_i) (equation 11).

    Args:
        first: (C,) output ranges of the first layer.
        second: (C,) input ranges of the second.
        limit: s stays within 1 / limit .. limit, so that a nearly dead channel does not reach float32's ends.
    Returns:
        (C,): divide the first layer's outputs and bias by it, multiply the second's inputs. 1 where a channel is
        zero in either layer.
    """
    alive = (first > 0) & (second > 0)
    ratio = torch.where(alive, first.double() / torch.where(alive, second, 1.0).double(), 1.0)
    return ratio.sqrt().clamp(1 / limit, limit).to(first.dtype)


def absorbed_bias(bias: Tensor, deviation: Tensor, spread: float = 3.0) -> Tensor:
    """c = max(0, b - 3 d): what the first layer's bias can give to the second's (section 4.1.3).

    Where z - c is nearly never negative, ReLU(z) = ReLU(z - c) + c; the second layer's bias grows by W2 c.

    Args:
        bias: (C,) mean before the ReLU, of a batch norm its bias.
        deviation: (C,) of the same, its weight's magnitude.
    """
    return (bias.detach() - spread * deviation.detach().abs()).clamp(min=0)
