"""Progressive freezing: layers of few values stop learning one after another, and the others adapt to them.

Values that are rounded keep jumping between two neighbours as long as their float weights move. Zhou et al.,
"Incremental network quantization", arXiv:1702.03044, fix the values in portions and train the rest; Brock et al.,
"FreezeOut", arXiv:1706.04983, fix whole layers from the front on, each at its time. This is the second on the values of
the first. Departure: the rate of the layers that still learn is that of the training, not one of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from tersenet.bricks.few_bits import FewBitLayer
from tersenet.errors import SettingsError
from tersenet.step import Companion
from tersenet.task import Task


@dataclass(frozen=True, kw_only=True)
class Freeze(Companion):
    """Freezes the weights, and their scales, of n layers at evenly spread times from `begin` to `end`.

    A frozen layer's weights get no gradient, so they and their scales stand still; norms and ranges of activations go
    on. All that the freezing goes by is the progress of the training.

    Args:
        begin, end: shares of the training, 0 <= begin < end <= 1. At `end` the last one is frozen.
        order: "front" freezes from the model's input on, "back" from its output on.
    """

    summary: ClassVar[str] = "freezes layers of few values one after another (after FreezeOut and INQ, 2017)"

    begin: float = 0.5
    end: float = 1.0
    order: Literal["front", "back"] = "front"

    @property
    def trades(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end <= 1:
            raise SettingsError(
                f"begin is {self.begin} and end is {self.end}; they must be shares of the training with "
                "0 <= begin < end <= 1, such as 0.5 and 1"
            )
        if self.order not in ("front", "back"):
            raise SettingsError(f"order must be front or back, got {self.order!r}")

    def count(self, layers: int, progress: float) -> int:
        """How many of some layers are frozen at a time."""
        if progress < self.begin:
            return 0
        # A hair more, so that a time is not missed by the rounding of the progress.
        return min(layers, int(layers * (progress - self.begin) / (self.end - self.begin) + 1e-9))

    def tick(self, model: nn.Module, progress: float) -> None:
        """Raises SettingsError when the model has no layers of few values."""
        found = _layers(model)
        if not found:
            raise SettingsError("freeze found no layers of few values; put quantize_aware in front of the training")
        if self.order == "back":
            found.reverse()
        count = self.count(len(found), progress)
        for place, layer in enumerate(found):
            layer.frozen = place < count

    def loss(self, model: nn.Module, task: Task, batch: Any, outputs: Any) -> Tensor | float:
        """Adds nothing. The forward is done and has recorded what learns, so the layers thaw for whoever comes next."""
        for layer in _layers(model):
            layer.frozen = False
        return 0.0


def _layers(model: nn.Module) -> list[FewBitLayer]:
    return [layer for layer in model.modules() if isinstance(layer, FewBitLayer)]
