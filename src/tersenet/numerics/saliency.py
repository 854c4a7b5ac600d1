"""How much each weight matters, one number per weight, so that vectors, kernels, blocks and channels sum the same.

name        a weight w counts as                   needs                      source
l1          |w|                                    nothing                    Li et al., arXiv:1608.08710
l2          w^2                                    nothing                    the same; Han et al., arXiv:1506.02626
lamp        w^2 / sum of v^2 with |v| >= |w|       nothing                    Lee et al., arXiv:2010.07611
gradient    mean |g|                               gradients of samples       the plain baseline of surveys
taylor      |w| mean |g|                           gradients of samples       Molchanov et al., arXiv:1611.06440
fisher      w^2 mean g^2 / 2                       gradients of samples       Theis et al., arXiv:1801.05787
obd         w^2 h / 2                              diagonal of the Hessian    LeCun et al. 1989, Optimal brain damage
obs         w^2 / (2 [H^-1]_ww)                    inverse of its blocks      Hassibi and Stork 1993; second_order.py

The gradient of a trained network is close to zero on average over its samples, so its size is averaged and not
itself. `fisher` is `obd` with the empirical Fisher information as the diagonal of the Hessian. Scores of whole channels
are in channel_saliency.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def l1(weight: Tensor) -> Tensor:
    """|w|, of any shape, in float64."""
    return weight.detach().double().abs()


def l2(weight: Tensor) -> Tensor:
    """w^2, of any shape, in float64: sums of it are squared norms."""
    return weight.detach().double().square()


def lamp(weight: Tensor) -> Tensor:
    """w^2 over the sum of squares of all weights of the tensor that are not smaller, itself included; in (0, 1].

    What is left of the layer when everything smaller is gone: the same order as |w| inside of a layer, and comparable
    between layers, of which the largest weight always counts 1. Equal weights go one after another, the first first.

    >>> lamp(torch.tensor([1.0, -2.0, 0.0]))
    tensor([0.2000, 1.0000, 0.0000], dtype=torch.float64)
    """
    squares = l2(weight).flatten()
    ascending = squares.argsort(stable=True)
    ordered = squares[ascending]
    left = ordered.flip(0).cumsum(0).flip(0)
    scores = torch.zeros_like(squares)
    scores[ascending] = torch.where(left > 0, ordered / left.clamp(min=torch.finfo(left.dtype).tiny), 0.0)
    return scores.view(weight.shape)


def gradient(mean_abs_gradient: Tensor) -> Tensor:
    """mean |g| over samples, in float64: how fast the loss changes with a weight, however large that is."""
    return mean_abs_gradient.detach().double()


def taylor(weight: Tensor, mean_abs_gradient: Tensor) -> Tensor:
    """|w| mean |g|: mean size of the first-order change of the loss when w becomes zero. Both of one shape."""
    return l1(weight) * mean_abs_gradient.detach().double()


def obd(weight: Tensor, diagonal: Tensor) -> Tensor:
    """w^2 h / 2: the second-order change of the loss when w becomes zero and no other weight moves.

    Args:
        diagonal: of the Hessian, in the weight's shape.
    """
    return 0.5 * l2(weight) * diagonal.detach().double()


def fisher(weight: Tensor, mean_square_gradient: Tensor) -> Tensor:
    """`obd` with mean g^2 over samples, the empirical Fisher information, as the diagonal of the Hessian."""
    return obd(weight, mean_square_gradient)


def obs(weight: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """w^2 / (2 [H^-1]_ww): the second-order change of the loss when w becomes zero and the others make up for it.

    Args:
        inverse_diagonal: of the inverse Hessian, in the weight's shape; second_order.py makes it.
    """
    return 0.5 * l2(weight) / inverse_diagonal.detach().double()
