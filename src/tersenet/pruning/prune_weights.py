"""Sets weights to zero, one by one or in patterns, and keeps them there by masks.

Magnitude: Han et al., "Learning both weights and connections for efficient neural networks", arXiv:1506.02626. What
else a weight can be judged by is in pruning/weight_scores.py, what goes together in numerics/patterns.py, how much goes
in pruning/choose.py, and the repair without training in pruning/refit.py. Zeros alone make no file faster, and only
some make it smaller: pruning/worth.py says what each pattern buys.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tersenet.bricks.evaluating import evaluating
from tersenet.bricks.mask import attach, masked_layers, stored_weight
from tersenet.bricks.opened import copied
from tersenet.bricks.plain import is_kind
from tersenet.errors import ModelError, SettingsError, TraceError
from tersenet.findings import tell
from tersenet.left_alone import LEFT_OUT, LeftAlone, another_kind, by_layer
from tersenet.numerics.divergence import divergence
from tersenet.numerics.outputs import joined
from tersenet.numerics.patterns import Pattern, can_lose, parse
from tersenet.numerics.samples import Inputs, in_parts
from tersenet.numerics.sparse_bytes import foretold
from tersenet.progress import progressing
from tersenet.pruning.choose import Cutoff, ScopeSetting, Scored, choose, output_first, scope_of
from tersenet.pruning.sound import NOTHING_TO_RECONSTRUCT_ON, UNDONE
from tersenet.pruning.weight_scores import DATA, IMPORTANCES, scores_of
from tersenet.step import Plan, Step
from tersenet.task import Task

if TYPE_CHECKING:
    from tersenet.pruning.refit import Refit

# Choices of a search: shares of zeros; layers of fewer weights save next to nothing.
_SHARES, _LEAST = (0.5, 0.7, 0.8, 0.9), 256


@dataclass(frozen=True, kw_only=True)
class PruneWeights(Step):
    """Masks the least important weights. The layers keep their shapes, and the numbers under the masks.

    Layers whose weight is frozen (requires_grad=False) are left alone. A layer that has a mask already gets a tighter
    one: what is gone stays gone. For pruning during a training set `sparsity: 0`, which attaches masks that let
    everything through, and give the training a `ramp`.

    Args:
        sparsity: share of the weights that become zero, 0 <= sparsity < 1, counted over all weights of a layer or,
            with scope "global", of all layers together. None is 0.5, or all that an "N:M" pattern asks for, which is
            then also the most.
        pattern: what goes together: "weight", "row", "column", "kernel", "filter" (masked, not cut out), blocks such as
            "16x1" (output x input channels), or "2:4" (at most 2 of 4 along the input channels stay).
        importance: "l1" or "l2" magnitude, "lamp", "random" as the control; with labelled data the mean "gradient",
            "taylor" or "fisher"; with unlabelled data "obs", the error of the layer's own output once the other weights
            make up for it. A group's importance is the mean of its weights'.
        scope: "layer" takes the same share of every layer; "global" the least important of all; "auto" is global for
            lamp, which within one layer ranks as magnitudes do, else layer.
        percentile: in place of `sparsity`, what scores below this percentile goes, 0 to 100.
        threshold: in place of both, what scores below this value goes; of l1 that is the mean |w| of a group.
        layers: in place of all of these, layer by layer: path -> a sparsity and, where it is another than `pattern`, a
            pattern ({"layer1.0.conv1": "0.8", "fc": "0.7 16x1"}); the others stay whole.
        refit: move the weights that stay to where the layer's output is nearest to what it was, on calibration data,
            and measure the norms anew (optimal brain surgeon, layer by layer). None does so where there are such data,
            True refuses to run without, False leaves the weights.
        samples: how many calibration samples importance and refit may read.
    """

    several_inputs: ClassVar[bool] = True
    family: ClassVar[str] = "prune"
    summary: ClassVar[str] = "sets weights to zero, one by one or in patterns, and keeps them there by masks"
    serves: ClassVar[tuple[str, ...]] = ("conv", "linear")
    special_runtime: ClassVar[bool] = True
    naming: ClassVar[tuple[str, ...]] = ("only", "skip", "layers")

    sparsity: float | None = None
    pattern: str = "weight"
    importance: str = "l1"
    scope: ScopeSetting = "auto"
    percentile: float | None = None
    threshold: float | None = None
    refit: bool | None = None
    samples: int = 512
    layers: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        pattern = parse(self.pattern)
        if self.importance not in IMPORTANCES:
            raise SettingsError(f"importance must be one of {', '.join(IMPORTANCES)}, got {self.importance!r}")
        if self.scope not in ("auto", "layer", "global"):
            raise SettingsError(f"scope must be auto, layer or global, got {self.scope!r}")
        given = [name for name in ("sparsity", "percentile", "threshold") if getattr(self, name) is not None]
        if len(given) > 1:
            raise SettingsError(f"{given[0]} and {given[1]} are both set; give one of them")
        check_sparsity(self.sparsity, pattern)
        if self.percentile is not None and not 0 <= self.percentile <= 100:
            raise SettingsError(f"percentile must lie in [0, 100], got {self.percentile}; it is one of the scores")
        if self.threshold is not None and not 0 <= self.threshold < math.inf:
            raise SettingsError(f"threshold must be a number of at least 0, got {self.threshold}")
        if self.layers is not None:
            if given:
                raise SettingsError(f"layers and {given[0]} are both set; give one of them")
            object.__setattr__(self, "layers", {path: str(setting) for path, setting in self.layers.items()})
            for setting in self.layers.values():
                self._each(setting)
        if self.samples < 1:
            raise SettingsError(f"samples must be at least 1, got {self.samples}")
        if self.threshold is not None and self.scope == "global":
            raise SettingsError("scope is 'global', which changes nothing beside threshold, the same bar everywhere")
        reads = "refit, and importances that read data"
        reading = self.refit is not False or self.data_needed() != "nothing"
        super().__post_init__(**({} if reading else {"samples": reads}))

    def data_needed(self) -> str:
        needed = DATA[self.importance]
        return "inputs" if self.refit and needed == "nothing" else needed

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """{"masks": {path: pattern}}: the layers that have something to lose and something left then."""
        found = {
            path: pattern.name
            for path, layer in maskable(model, self)
            if (pattern := self._pattern(path)) is not None and _can_lose(layer, pattern)
        }
        missing = [path for path in self.layers or {} if path not in found]
        if missing:
            raise SettingsError(f"layers names {missing[0]!r}, which is no layer here that can be masked; see the plan")
        return {"masks": found} if found else {}

    def left_alone(self, model: nn.Module, plan: Plan, task: Task) -> LeftAlone | None:
        def why(path: str, layer: nn.Module) -> str | None:
            if path in plan.get("masks", {}):
                return None
            if not isinstance(layer, _ConvNd | nn.Linear):
                return another_kind(layer)
            if not _has_weight(layer):
                return "are frozen (requires_grad is off) or whole numbers"
            if not self.matches(path, layer):
                return LEFT_OUT
            pattern = self._pattern(path)
            return "are not named in layers" if pattern is None else f"are too small for the pattern {pattern.name}"

        return by_layer(model, why)

    @property
    def tunable(self) -> bool:
        """Where it is not said how much goes."""
        return all(each is None for each in (self.sparsity, self.percentile, self.threshold, self.layers))

    def choices(self, model: nn.Module, task: Task) -> dict[str, list[Any]]:
        """Path of a layer -> "0" for as it is, or a share of zeros in this pattern, which buys bytes once coded."""
        pattern = parse(self.pattern)
        found = {}
        for path, layer in maskable(model, self):
            shares = [share for share in _SHARES if share <= pattern.highest] or [pattern.highest]
            if _can_lose(layer, pattern) and layer.weight.numel() >= _LEAST:
                found[path] = ["0", *(f"{share:g}" for share in shares)]
        return found

    def sensitivities(self, model: nn.Module, task: Task, images: Inputs) -> dict[str, dict[Any, float]]:
        """path -> share of zeros -> divergence of the outputs when this layer alone is masked.

        By default nothing is moved to make up for it, which would take as long as the whole step for each share, makes
        all of them better and changes little in their order. With `refit: true` they are found by trying.
        """
        if self.refit:
            return {}
        quick = dataclasses.replace(self, refit=False, samples=type(self).samples)
        found: dict[str, dict[Any, float]] = {}
        choices = self.choices(model, task)
        with evaluating(model), torch.no_grad():
            wanted = outputs_of(model, images)
            with progressing(f"sensitivities of {self.name}", len(choices), not task.quiet) as advance:
                for path, shares in choices.items():
                    found[path] = dict.fromkeys(shares, 0.0)
                    for share in shares[1:]:
                        alone = quick.chosen({path: share})
                        assert alone is not None, "a share above 0"
                        made, _ = alone.run(copied(model), dataclasses.replace(task, quiet=True))
                        found[path][share] = divergence(wanted, outputs_of(made, images))
                    advance(1)
        return found

    def foretold_bytes(self, setting: Any, shape: tuple[int, ...], bits: int) -> float:
        sparsity, pattern = self._each(setting)
        return foretold(math.prod(shape), bits, sparsity, math.prod(pattern.unit(shape)))

    def chosen(self, picked: Mapping[str, Any]) -> PruneWeights | None:
        """The layers that are picked, each with its share of zeros."""
        layers = {path: str(setting) for path, setting in picked.items() if self._each(str(setting))[0] > 0}
        return (
            dataclasses.replace(self, sparsity=None, percentile=None, threshold=None, layers=layers) if layers else None
        )

    def _each(self, setting: str) -> tuple[float, Pattern]:
        """(sparsity, pattern) of a setting of `layers`."""
        share, _, name = setting.partition(" ")
        pattern = parse(name.strip() or self.pattern)
        try:
            sparsity = float(share)
        except ValueError:
            raise SettingsError(
                f"layers has {setting!r}; write a sparsity, and a pattern where it is another: '0.7 16x1'"
            ) from None
        check_sparsity(sparsity, pattern)
        return sparsity, pattern

    def _pattern(self, path: str) -> Pattern | None:
        """What the mask of a layer is to look like; None for a layer that gets none."""
        if self.layers is None:
            return parse(self.pattern)
        return self._each(self.layers[path])[1] if path in self.layers else None

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Attaches masks that let everything through. Raises SettingsError when the plan is another model's."""
        for path, pattern in plan.get("masks", {}).items():
            try:
                layer = model.get_submodule(path)
            except AttributeError:
                raise SettingsError(
                    f"the plan masks {path}, which this model has not; apply it to the model it is of"
                ) from None
            if not _has_weight(layer):
                raise SettingsError(
                    f"the plan masks {path}, which is {type(layer).__name__} here; it is another model's"
                )
            parse(pattern)
            attach(layer, pattern)
        return model

    def fit(self, model: nn.Module, task: Task) -> None:
        """Chooses the masks, then moves what stays where `refit` asks for it.

        Raises:
            DataError: without the data that the importance or the refit needs.
            ModelError: on weights that are not finite.
        """
        found: dict[str, tuple[Any, Any]] = {}
        for path, layer, mask in masked_layers(model):
            pattern = self._pattern(path)
            if pattern is not None and mask.pattern == pattern.name and self.matches(path, layer):
                found |= {path: (layer, mask)} if _can_lose(layer, pattern) else {}
        if not found:
            return
        for path, (layer, _) in found.items():
            if not bool(torch.isfinite(layer.weight).all()):
                raise ModelError(f"the weights of {path or 'the layer'} hold NaN or infinity; load finite weights")
        if self.layers is not None or self._cutoff(parse(self.pattern)).share != 0.0:
            scores = scores_of(
                model, {path: layer for path, (layer, _) in found.items()}, task, self.importance, self.samples
            )
            scored = {
                path: Scored(output_first(layer, scores[path]), output_first(layer, mask.mask), parse(mask.pattern))
                for path, (layer, mask) in found.items()
            }
            refit = self._refit(model, found, task)
            for path, kept in self._kept(scored).items():
                layer, mask = found[path]
                mask.mask.copy_(output_first(layer, kept))
            if refit is not None and not refit.run():
                tell([UNDONE], task.quiet)

    def _refit(self, model: nn.Module, paths: Collection[str], task: Task) -> Refit | None:
        """What moves the weights that stay, once the masks are chosen; None where they are left as they are."""
        if self.refit is None and not task.has_inputs:
            tell([NOTHING_TO_RECONSTRUCT_ON], task.quiet)
        if not (task.has_inputs if self.refit is None else self.refit):
            return None
        from tersenet.pruning.refit import Refit

        try:
            return Refit(model, paths, task, self.samples)
        except TraceError as error:
            if self.refit:
                raise
            tell(
                [f"the layers cannot be reconstructed, so the weights that stay are as they were: {error}"], task.quiet
            )
        return None

    def _kept(self, scored: dict[str, Scored]) -> dict[str, Tensor]:
        """Path -> (O, I, ...) bool, what stays."""
        if self.layers is None:
            return choose(scored, self._cutoff(parse(self.pattern)), scope_of(self.scope, self.importance))
        kept: dict[str, Tensor] = {}
        for path, own in scored.items():
            kept |= choose({path: own}, Cutoff(share=self._each(self.layers[path])[0]))
        return kept

    def _cutoff(self, pattern: Pattern) -> Cutoff:
        if self.percentile is not None:
            return Cutoff(percentile=self.percentile)
        if self.threshold is not None:
            return Cutoff(value=self.threshold)
        share = self.sparsity
        if share is None:
            share = 0.5 if pattern.group is None else pattern.highest
        return Cutoff(share=share)


def outputs_of(model: nn.Module, images: Inputs) -> list[Tensor]:
    """All outputs of floating point, (N, ...) each, in pieces of 64."""
    return [each.float() for each in joined([model(*part) for part in in_parts(images, 64)])]


def check_sparsity(sparsity: float | None, pattern: Pattern) -> None:
    """Raises SettingsError when it is no share, or more than an N:M pattern takes."""
    if sparsity is None:
        return
    if not 0 <= sparsity < 1:
        raise SettingsError(f"sparsity must lie in [0, 1), got {sparsity}; it is the share of weights that become zero")
    if sparsity > pattern.highest:
        raise SettingsError(
            f"sparsity is {sparsity}, but pattern {pattern.name} takes {pattern.highest:g} of the weights at most; "
            "leave sparsity out, or take another pattern"
        )


def maskable(model: nn.Module, step: Step) -> Iterator[tuple[str, Any]]:
    """(path, layer) of what the step may give a mask, in the model's order."""
    for path, module in model.named_modules():
        if _has_weight(module) and step.matches(path, module):
            yield path, module


def _has_weight(module: Any) -> bool:
    """A convolution or linear layer whose weight learns. Integers of a settled layer do not, nor do constants, such as
    the 0 and 1 of a shortcut that `quantize` made a convolution of."""
    if not is_kind(module, _ConvNd | nn.Linear):
        return False
    weight: Any = stored_weight(module)
    return isinstance(weight, nn.Parameter) and weight.requires_grad


def _can_lose(layer: Any, pattern: Pattern) -> bool:
    return can_lose(tuple(output_first(layer, layer.weight).shape), pattern)
