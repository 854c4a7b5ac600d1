"""Companions that push what is to be cut towards zero during training, so that the cut that follows costs little.

`ScalePenalty`: L1 on the scales of batch norms, network slimming (Liu et al., arXiv:1708.06519, section 3).
`GroupLasso`: sum of the groups' L2 norms, structured sparsity learning (Wen et al., arXiv:1608.03665, equation 2), each
times the root of its size as in the group lasso itself (Yuan & Lin, J. R. Statist. Soc. B 68, 2006), so that large and
small groups are pushed alike. A strength that grows during the training: Wang et al., arXiv:2012.09243.

Departure: Wen et al. leave the root out. All of them take the subgradient (0 at 0), as the papers do, so that what
should be 0 comes close to it, within learning rate times strength, and not exactly there.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tersenet.errors import ModelError, SettingsError
from tersenet.step import Companion, layers
from tersenet.task import Task

Groups = Literal["filters", "channels", "kernels"]

# Companions hold no state, and only `tick` is told how far a training is.
_progress: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class _Penalty(Companion):
    """What both share: a strength, whether it grows, and the layers that they touch."""

    strength: float = 1e-4
    growing: bool = False
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    @property
    def trades(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise SettingsError(f"strength must be at least 0, got {self.strength}; 1e-4 is usual")
        super().__post_init__()

    def tick(self, model: nn.Module, progress: float) -> None:
        _progress[model] = progress

    def _now(self, model: nn.Module) -> float:
        """The strength at this moment; one that grows does so linearly from 0."""
        return self.strength * (_progress.get(model, 0.0) if self.growing else 1.0)


@dataclass(frozen=True, kw_only=True)
class ScalePenalty(_Penalty):
    """strength * sum of |scale| over all channels of the batch norms.

        loss = strength * sum_c |gamma_c|        d loss / d gamma_c = strength * sign(gamma_c), 0 at 0

    A channel whose scale is near 0 is near a constant, which `prune_channels` with importance batch_norm then takes
    out.

    Args:
        strength: at least 0; the paper takes 1e-4 for VGG and 1e-5 for ResNets.
        growing: let it grow linearly from 0 over the training.
        only, skip: of the norms, as in steps; those on a residual path usually cannot be cut and may be skipped.
    """

    summary: ClassVar[str] = "pushes the scales of batch norms to zero, for a cut that follows (network slimming, 2017)"

    def loss(self, model: nn.Module, task: Task, batch: Any, outputs: Any) -> Tensor:
        """Raises ModelError where no batch norm with scales is touched."""
        scales = [
            norm.weight.float().abs().sum() for _, norm in layers(model, (_BatchNorm,), self) if norm.weight is not None
        ]
        if not scales:
            raise ModelError("scale_penalty found no batch norm with scales; use group_lasso, or only and skip less")
        return self._now(model) * torch.stack(scales).sum()


@dataclass(frozen=True, kw_only=True)
class GroupLasso(_Penalty):
    """strength * sum over groups g of sqrt(|g|) * ||w_g||, over convolutions and linear layers.

        d loss / d w_g = strength * sqrt(|g|) * w_g / ||w_g||, 0 where w_g = 0

    A batch norm takes back what its layer's filters lose in size: before norms push "channels", or use ScalePenalty.

    Args:
        strength: at least 0.
        growing: let it grow linearly from 0 over the training.
        groups: "filters", all weights that make one output; "channels", all that read one input; "kernels", the k x k
            weights between one input and one output of a convolution.
        only, skip: of the layers, as in steps. Outputs of the last layer cannot be cut: with "filters", skip it.
    """

    summary: ClassVar[str] = "pushes whole filters, channels or kernels to zero, for a cut that follows (SSL, 2016)"

    groups: Groups = "filters"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups not in get_args(Groups):
            raise SettingsError(f"groups is {self.groups!r}; allowed: {', '.join(get_args(Groups))}")

    def loss(self, model: nn.Module, task: Task, batch: Any, outputs: Any) -> Tensor:
        """Raises ModelError where no layer is touched."""
        kinds = (_ConvNd,) if self.groups == "kernels" else (_ConvNd, nn.Linear)
        norms = [_group_lasso(layer, self.groups) for _, layer in layers(model, kinds, self)]
        if not norms:
            raise ModelError(f"group_lasso found no layer with {self.groups}; change only and skip")
        return self._now(model) * torch.stack(norms).sum()


def _group_lasso(layer: Any, groups: Groups) -> Tensor:
    """Sum of sqrt(|g|) * ||w_g|| of one layer."""
    weight, blocks = layer.weight.float(), getattr(layer, "groups", 1)
    rows = weight.reshape(blocks, len(weight) // blocks, weight.shape[1], -1)  # (G, O / G, I / G, k * k)
    if isinstance(layer, _ConvTransposeNd):  # its weight begins with the inputs
        rows = rows.transpose(1, 2)
    over = {"filters": (2, 3), "channels": (1, 3), "kernels": (3,)}[groups]
    norms = torch.linalg.vector_norm(rows, dim=over)
    return math.sqrt(rows.numel() / norms.numel()) * norms.sum()
