"""Training towards zeros in activations: a penalty on what the convolutions and linear layers read.

"l1" is that of Georgiadis, "Accelerating convolutional neural networks via activation map compression",
arXiv:1812.03471; "hoyer" the squared Hoyer measure of Kurtz et al., ICML 2020, which does not fall when all values
shrink together. Departures: both are means over layers and not sums, so that a weight means the same for a deep and a
shallow network, and Hoyer is divided by the number of values.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tersenet.errors import SettingsError
from tersenet.pruning.activation_sites import READERS
from tersenet.step import Companion
from tersenet.task import Task

KINDS = ("hoyer", "l1")


@dataclass(frozen=True, kw_only=True)
class ActivationPenalty(Companion):
    """weight * the mean over the values x that convolutions and linear layers read of

        hoyer: mean over samples of (sum |x|)^2 / (n sum x^2), between 1 / n (one value left) and 1 (all alike)
        l1:    mean of |x|

    Values that depend on no parameter, such as the model's input, are left out. Behind a `Threshold` the values are
    those that are left. L1 can also be lowered by making everything smaller where a norm behind makes it large again.

    Args:
        kind: "hoyer" or "l1".
        weight: at least 0; 0.1 to 1 for hoyer, whose size is about the share of values that matter.
        only: the layers whose inputs count: paths, wildcards or types, as for steps; empty means all.
        skip: the layers whose inputs do not.
    """

    summary: ClassVar[str] = "makes activations sparse (Kurtz et al., 2020; Georgiadis, 2018)"

    kind: str = "hoyer"
    weight: float = 0.2
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    @property
    def trades(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SettingsError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not 0 <= self.weight < math.inf:
            raise SettingsError(f"weight must be at least 0, got {self.weight}")
        super().__post_init__()

    def tick(self, model: nn.Module, progress: float) -> None:
        """Looks on during the next forward; `loss` stops looking, so that nothing stays attached to the model."""
        _stop(model)
        watch = _Watch()
        for path, layer in model.named_modules():
            if isinstance(layer, READERS) and self.matches(path, layer):
                watch.handles.append(layer.register_forward_pre_hook(watch.see))
        _watches[model] = watch

    def loss(self, model: nn.Module, task: Task, batch: Any, outputs: Any) -> Tensor | float:
        watch = _stop(model)
        if watch is None or not watch.seen:
            return 0.0
        measure = hoyer if self.kind == "hoyer" else _mean_size
        return self.weight * sum(measure(x) for x in watch.seen.values()) / len(watch.seen)


def hoyer(x: Tensor) -> Tensor:
    """Mean over samples of (sum |x|)^2 / (n sum x^2), for x (N, ...); 0 for samples of zeros. Scale does not matter."""
    flat = x.float().flatten(1)
    squares = flat.square().sum(dim=1)
    return (flat.abs().sum(dim=1).square() / (flat.shape[1] * squares.clamp(min=1e-12))).mean()


def _mean_size(x: Tensor) -> Tensor:
    return x.float().abs().mean()


class _Watch:
    """What was read in one forward; a value that several layers read is there once."""

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self.seen: dict[int, Tensor] = {}

    def see(self, layer: nn.Module, args: tuple[Tensor]) -> None:
        if args[0].requires_grad:
            self.seen[id(args[0])] = args[0]


_watches: weakref.WeakKeyDictionary[nn.Module, _Watch] = weakref.WeakKeyDictionary()


def _stop(model: nn.Module) -> _Watch | None:
    watch = _watches.pop(model, None)
    for handle in watch.handles if watch is not None else ():
        handle.remove()
    return watch
