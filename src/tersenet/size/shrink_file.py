"""Rounds all weights so that the .terse file is small: one price for a bit in the whole network, found for a budget.

The next bit is spent where it buys the most: with one price everywhere, steps, zeros and values of all layers follow
from what an error costs at the network's output (size/sensitivity.py) and what a value costs in the file
(numerics/rated_rounding.py), as equal slopes demand (Shoham and Gersho, "Efficient bit allocation for an arbitrary set
of quantizers", IEEE Trans. ASSP 36(9), 1988). Only the price is searched for.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from tersenet.bricks.settle import settle
from tersenet.codec import container
from tersenet.errors import SettingsError
from tersenet.graph.trace import trace
from tersenet.left_alone import LEFT_OUT, LeftAlone, by_layer
from tersenet.size.judge import Judge
from tersenet.size.rounding import Pricer, why_not_rounded
from tersenet.step import Plan, Step
from tersenet.task import Task

# Divergence in nats per bit: from what no network noticed to what left nothing of any.
_LOWEST, _HIGHEST = 1e-14, 1e-2
_START = 0.1  # of all weights together
_TRIES = 8


@dataclass(frozen=True, kw_only=True)
class ShrinkFile(Step):
    """Puts weights and biases on grids that a .terse file codes in few bytes. Needs no labels and no training.

    The step of each row's grid, the zeros and all values are chosen by what they cost and what they hurt; layers are
    gone through in order, each making up for what the ones before it lose. Give one of `bytes`, `max_drop` and `price`.
    Fold batch norms first (`fold_batch_norm`): their numbers cost bytes. It comes last, or before `keep_grids`, without
    which a training after it undoes it.

    Without data (no training or calibration images) layers are rounded by their weights alone, and only `bytes` or
    `price` can be asked for. Masks stay: what they hide stays zero. Layers with other parametrizations, quantized
    layers, and layers called more than once are left alone.

    Args:
        bytes: of the coded tensors and their table, such as "0.08x" of the original's float32 parameters, or a number.
            The graph in the head of a file comes on top: 1 KB for a ResNet-20, 4 KB for a ResNet-56.
        max_drop: points of score that may be lost, judged as size/judge.py says; never by the test set.
        price: divergence from the original's outputs (nats, at temperature 4) that one bit is worth.
        samples: how many calibration images are read.
        augmented: read images as a training sees them, moved and mirrored. Better for a network that knows its training
            images by heart: on a ResNet-56 of 98.8 % there, a tenth less divergence on other augmented images.
        images: how many images judge `max_drop`.
    """

    several_inputs: ClassVar[bool] = True
    family: ClassVar[str] = "size"
    summary: ClassVar[str] = "rounds weights so that the coded file meets a budget of bytes or of score"
    serves: ClassVar[tuple[str, ...]] = ("conv", "linear")
    needs: ClassVar[str] = "nothing"
    changes_structure: ClassVar[bool] = False

    bytes: str | int | None = None
    max_drop: float | None = None
    price: float | None = None
    samples: int = 512
    augmented: bool = False
    images: int = 2000

    def __post_init__(self) -> None:
        given = [name for name in ("bytes", "max_drop", "price") if getattr(self, name) is not None]
        if len(given) != 1:
            found = "none" if not given else " and ".join(given)
            raise SettingsError(f"shrink_file takes one of bytes, max_drop and price, got {found}; give max_drop: 0.35")
        if self.bytes is not None:
            wanted_bytes(self.bytes, 1)
        if self.max_drop is not None and not 0 <= self.max_drop < math.inf:
            raise SettingsError(f"max_drop must be at least 0 points, got {self.max_drop}; 0.35 is a third of a point")
        if self.price is not None and not _LOWEST <= self.price <= _HIGHEST:
            raise SettingsError(f"price must lie in [{_LOWEST:g}, {_HIGHEST:g}] nats per bit, got {self.price}")
        for name in ("samples", "images"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")
        super().__post_init__(**({"images": "max_drop"} if self.max_drop is None else {}))

    def data_needed(self) -> str:
        return "nothing" if self.max_drop is None else "inputs"

    def left_alone(self, model: nn.Module, plan: Plan, task: Task) -> LeftAlone | None:
        graph = trace(model, task.example)

        def why(path: str, layer: nn.Module) -> str | None:
            return why_not_rounded(graph, path, layer) or (None if self.matches(path, layer) else LEFT_OUT)

        return by_layer(model, why)

    def fit(self, model: nn.Module, task: Task) -> None:
        """Rounds the weights in place.

        Raises:
            DataError: with `max_drop` and nothing to judge by.
            SettingsError: when `bytes` is less than what is left when every weight is zero.
        """
        pricer = Pricer.of(model, task.example, self.matches, _images(model, task, self.samples, self.augmented))
        if not pricer.paths:
            return
        if self.price is not None:
            found = pricer.at(self.price)
        elif self.bytes is not None:
            original = task.original if task.original is not None else model
            budget = wanted_bytes(self.bytes, 4 * sum(p.numel() for p in original.parameters()))
            lacking = f"no grid fits into {budget} bytes; ask for more, or prune channels first"
            found = _at_the_limit(pricer, lambda made: coded_bytes(made) / budget, rising=False, lacking=lacking)
        else:
            judge, allowed = Judge.of(model, task, self.images), max(self.max_drop or 0.0, 1e-6)
            lacking = f"no grid loses at most {self.max_drop} points, judged by {judge.said}; allow more"
            found = _at_the_limit(pricer, lambda made: judge.drop(made) / allowed, rising=True, lacking=lacking)
        model.load_state_dict(found.state_dict())


def wanted_bytes(given: str | int, original: int) -> int:
    """A number of bytes, or a share such as "0.08x" of the original's."""
    try:
        share = isinstance(given, str) and given.endswith("x")
        value = float(str(given).removesuffix("x")) * (original if share else 1)
    except ValueError:
        value = math.nan
    if isinstance(given, bool) or not 0 < value < math.inf:
        raise SettingsError(
            f'bytes must be a number above 0 or a share such as "0.08x" of the float32 parameters, got {given!r}'
        )
    return max(1, int(value))


def coded_bytes(model: nn.Module) -> int:
    """Bytes of a .terse file with the model's tensors, settled, and no graph."""
    state = settle(copy.deepcopy(model)).state_dict()
    # -0.0 as 0.0: masks and rounding leave both, and only one of them is on a grid.
    tensors = {name: value.detach() + 0.0 if value.is_floating_point() else value for name, value in state.items()}
    return len(container.pack({}, tensors))


def _images(model: nn.Module, task: Task, count: int, augmented: bool) -> tuple[Tensor, ...] | None:
    """All inputs of unlabelled samples, at most `count`; None where there are none."""
    if task.calibrate is None and task.train is None:
        return None
    if augmented and task.train is not None:
        task = dataclasses.replace(task, calibrate=None)  # then those of the training serve
    return task.inputs_like(model, count)


def _at_the_limit(pricer: Pricer, used: Callable[[nn.Module], float], rising: bool, lacking: str) -> nn.Module:
    """The model of the last price at which no more than 1 of a budget is used, to a few percent.

    Args:
        used: share of the budget that a model uses.
        rising: whether it rises with the price, as a drop does, or falls, as bytes do.
        lacking: what to say where no price will do.
    """
    good: tuple[float, float, nn.Module] | None = None  # price, share, model
    bad: tuple[float, float] | None = None
    # Bytes fall about as price^-0.3, points are lost about as price^1.3: where to look next, in logarithms.
    slope, enough = (1.3, 0.8) if rising else (-0.3, 0.98)
    price = _START / pricer.weights
    for number in range(_TRIES):
        made = pricer.at(price)
        share = max(used(made), 1e-3)
        if share <= 1:
            if good is None or share >= good[1]:
                good = (price, share, made)
            if share >= enough:
                break
        elif bad is None or share <= bad[1]:
            bad = (price, share)
        if good is not None and bad is not None:
            whole = math.log(bad[0] / good[0])
            part = min(max(math.log(0.98 / good[1]) / math.log(bad[1] / good[1]), 0.1), 0.9)
            # Where it bends, a straight line comes near from one side only: every other time halfway.
            price = good[0] * math.exp((part if number % 2 else 0.5) * whole)
        else:
            step = min(max((0.95 / share) ** (1 / slope), 1 / 30), 30.0)
            if not _LOWEST < price * step < _HIGHEST and price in (_LOWEST, _HIGHEST):
                break
            price = min(max(price * step, _LOWEST), _HIGHEST)
    if good is None:
        raise SettingsError(lacking)
    return good[2]
