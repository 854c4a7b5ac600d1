"""Pruning during a training: the masks grow while the weights that stay learn to do without, and may grow back.

The ramp is that of Zhu and Gupta, "To prune, or not to prune", arXiv:1710.01878, equation 1. Growing back is dynamic
network surgery (Guo et al., arXiv:1608.04493): the numbers under the masks go on learning, and come back when they are
large again. Departure: its two thresholds, between which nothing changes, lie a margin apart around the one that gives
the ramp's sparsity, so that the share of zeros is exact at each time and the thresholds need not be set by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tersenet.bricks.mask import Mask, masked_layers, stored_weight
from tersenet.errors import SettingsError
from tersenet.numerics.patterns import parse
from tersenet.pruning.choose import Cutoff, ScopeSetting, Scored, choose, output_first, scope_of
from tersenet.pruning.weight_scores import FROM_WEIGHTS
from tersenet.step import Companion
from tersenet.task import Task


@dataclass(frozen=True, kw_only=True)
class Ramp(Companion):
    """Tightens the masks of a model during its training, each in its own pattern; `prune_weights` attaches them.

        sparsity(t) = sparsity + (start - sparsity) (1 - t)^3,   t from 0 at `begin` to 1 at `end`

    The masks are chosen at `updates` + 1 times, evenly spread, of which the first is at `begin` and the last at `end`;
    from then on they stand still. A training needs at least 1 / (1 - end) batches to come that far.

    Args:
        sparsity: share of zeros at the end, 0 <= sparsity < 1, per layer or over all masked layers.
        start: share of zeros at the beginning; masks that have more keep it until the ramp has passed them.
        begin, end: shares of the training, 0 <= begin < end < 1.
        updates: in how many steps the masks grow, at least 1.
        importance: "l1", "l2" or "lamp".
        scope: "layer" gives every layer the same share, "global" takes the least important of all; "auto" is global
            for lamp, else layer.
        regrow: let what is gone learn on and come back. Then masks do not only tighten: they have `start` zeros at
            `begin`, whatever they had before.
        margin: with `regrow`, what is there stays until it scores this much less than what stands at the limit, and
            what is gone comes back when it scores this much more; 0 <= margin < 1.
    """

    summary: ClassVar[str] = "tightens masks during the training, with or without growing back (Zhu and Gupta, 2017)"

    sparsity: float
    start: float = 0.0
    begin: float = 0.0
    end: float = 0.75
    updates: int = 100
    importance: str = "l1"
    scope: ScopeSetting = "auto"
    regrow: bool = False
    margin: float = 0.1

    @property
    def trades(self) -> bool:
        return True

    def __post_init__(self) -> None:
        for name in ("sparsity", "start", "margin"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.start > self.sparsity:
            raise SettingsError(f"start is {self.start} and sparsity {self.sparsity}; a ramp goes up, so swap them")
        if not 0 <= self.begin < self.end < 1:
            raise SettingsError(
                f"begin is {self.begin} and end is {self.end}; they must be shares of the training with "
                "0 <= begin < end < 1, such as 0 and 0.75"
            )
        super().__post_init__(**({} if self.regrow else {"margin": "regrow: true"}))
        if self.updates < 1:
            raise SettingsError(f"updates must be at least 1, got {self.updates}; 100 is usual")
        if self.importance not in FROM_WEIGHTS:
            raise SettingsError(f"importance must be one of {', '.join(FROM_WEIGHTS)}, got {self.importance!r}")
        if self.scope not in ("auto", "layer", "global"):
            raise SettingsError(f"scope must be auto, layer or global, got {self.scope!r}")

    def at(self, round: int) -> float:
        """The share of zeros after a round, 1 to updates + 1."""
        t = (round - 1) / self.updates
        return self.sparsity + (self.start - self.sparsity) * (1 - t) ** 3

    def tick(self, model: nn.Module, progress: float) -> None:
        """Chooses the masks anew where a new round begins. All it goes by is the progress and the model's numbers.

        Raises:
            SettingsError: when the model has no masks, or masks of an N:M pattern that takes less than `sparsity`.
        """
        found = list(masked_layers(model))
        if not found:
            raise SettingsError(
                "ramp found no masks in the model; put prune_weights: {sparsity: 0} in front of the training"
            )
        masks = [mask for _, _, mask in found]
        if progress == 0.0:
            self._check(masks)
            for mask in masks:
                mask.enter(0)
        for mask in masks:
            mask.regrowing = self.regrow
        if progress < self.begin:
            return
        share = (progress - self.begin) / (self.end - self.begin)
        # A hair more, so that a round that begins at this very batch is not missed by the rounding of the progress.
        round = 1 + min(self.updates, int(share * self.updates + 1e-9))
        if masks[0].entered() != round:
            self._choose(found, self.at(round))
            for mask in masks:
                mask.enter(round)

    def loss(self, model: nn.Module, task: Task, batch: Any, outputs: Any) -> Tensor | float:
        """Adds nothing. The forward is done, and what it recorded for the gradient stays, so the masks close again."""
        for _, _, mask in masked_layers(model):
            mask.regrowing = False
        return 0.0

    def _check(self, masks: list[Mask]) -> None:
        for mask in masks:
            highest = parse(mask.pattern).highest
            if self.sparsity > highest:
                raise SettingsError(
                    f"sparsity is {self.sparsity}, but pattern {mask.pattern} takes {highest:g} of the weights at most"
                )

    @torch.no_grad()
    def _choose(self, found: list[tuple[str, Any, Mask]], sparsity: float) -> None:
        scored = {}
        for path, layer, mask in found:
            scores = FROM_WEIGHTS[self.importance](stored_weight(layer))
            present = mask.mask
            if self.regrow:
                scores = scores * torch.where(present, 1 + self.margin, 1 - self.margin)
                present = torch.ones_like(present)
            scored[path] = Scored(output_first(layer, scores), output_first(layer, present), parse(mask.pattern))
        kept = choose(scored, Cutoff(share=sparsity), scope_of(self.scope, self.importance))
        for path, layer, mask in found:
            mask.mask.copy_(output_first(layer, kept[path]))
