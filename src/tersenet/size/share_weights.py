"""Clusters the weights of each layer; a training after it trains the shared values.

Han, Mao and Dally, "Deep compression", arXiv:1510.00149, section 3. Departures: the clusters are those of least squared
error (numerics/codebooks.py), not k-means from evenly spread starts, so there is no start to choose; and the zeros of a
pruned layer are a value of their own, as the paper's sparse indices imply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from tersenet.bricks.mask import at_most_masked, release, stored_weight
from tersenet.bricks.plain import is_kind
from tersenet.bricks.shared import share, shared_of
from tersenet.errors import ModelError, SettingsError
from tersenet.left_alone import LEFT_OUT, LeftAlone, another_kind, by_layer
from tersenet.numerics.codebooks import nearest_codes, optimal_codebook
from tersenet.step import Plan, Step
from tersenet.task import Task


@dataclass(frozen=True, kw_only=True)
class ShareWeights(Step):
    """Gives each layer a codebook: 2^bits values, of which 0 is one where weights are zero. Masks become zeros.

    A `train` after it trains the shared values (and biases and norms); `settle` makes them permanent. In a .terse file
    a layer is then its codebook and its indices. Adam suits the training: a shared value's gradient is the sum over
    its members, which differ in number by thousands from layer to layer.

    Args:
        bits: 1 to 8, per weight before entropy coding.
        keep_zeros: weights that are exactly zero stay so, and take one of the values; False clusters them, too.
    """

    several_inputs: ClassVar[bool] = True
    family: ClassVar[str] = "size"
    summary: ClassVar[str] = "clusters the weights of each layer into shared values that train (Deep Compression)"
    serves: ClassVar[tuple[str, ...]] = ("conv", "linear")

    bits: int = 4
    keep_zeros: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.bits, bool) or self.bits not in range(1, 9):
            raise SettingsError(f"bits must lie in 1..8, got {self.bits!r}; a codebook has 2^bits values")

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """{"shared": {path: {"values": shared values that learn, "zero": whether 0 is one beside them}}}"""
        found = {}
        for path, layer in model.named_modules():
            if _shareable(layer) and self.matches(path, layer):
                zero = self.keep_zeros and bool((layer.weight == 0).any())
                found[path] = {"values": 2**self.bits - zero, "zero": zero}
        return {"shared": found} if found else {}

    def left_alone(self, model: nn.Module, plan: Plan, task: Task) -> LeftAlone | None:
        def why(path: str, layer: nn.Module) -> str | None:
            if path in plan.get("shared", {}):
                return None
            if not isinstance(layer, _ConvNd | nn.Linear):
                return another_kind(layer)
            return LEFT_OUT if _shareable(layer) else "are frozen, whole numbers, or have another parametrization"

        return by_layer(model, why)

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        for path, entry in plan.get("shared", {}).items():
            layer: Any = model.get_submodule(path)
            if parametrize.is_parametrized(layer, "weight"):
                release(layer)
            share(layer, entry["values"], entry["zero"])
        return model

    def fit(self, model: nn.Module, task: Task) -> None:
        """Chooses the shared values and gives each weight the nearest. Raises ModelError on weights not finite."""
        for path, layer in model.named_modules():
            shared = shared_of(layer)
            if shared is None or not self.matches(path, layer) or bool(shared.book.any()):
                continue
            weight = stored_weight(layer).detach()
            if not bool(torch.isfinite(weight).all()):
                raise ModelError(f"the weights of {path or 'the layer'} hold NaN or infinity; load finite weights")
            kept = weight != 0 if shared.zero else torch.ones_like(weight, dtype=torch.bool)
            if not bool(kept.any()):
                continue
            book = optimal_codebook(weight[kept], shared.values)
            codes = nearest_codes(weight, book.to(weight.device))
            shared.codes.copy_(torch.where(kept, codes + int(shared.zero), 0))
            with torch.no_grad():
                shared.book[: len(book)] = book
                shared.book[len(book) :] = book[-1]


def _shareable(layer: Any) -> bool:
    """A convolution or linear layer whose weight learns, under a mask at most."""
    if not is_kind(layer, _ConvNd | nn.Linear):
        return False
    weight: Any = stored_weight(layer)
    return at_most_masked(layer) and isinstance(weight, nn.Parameter) and weight.requires_grad
