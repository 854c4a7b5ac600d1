"""Quantization after training: weights of many formats, activations per tensor with calibrated ranges.

With activations, the scheme is that of Jacob et al., "Quantization and training of neural networks for efficient
integer-arithmetic-only inference", arXiv:1712.05877, with symmetric weights per channel as in Krishnamoorthi,
arXiv:1806.08342, which is what ONNX Runtime and OpenVINO have kernels for. What PyTorch simulates afterwards is what
those runtimes compute, up to ties in rounding. Formats are in quantization/formats.py, how activations are calibrated
in quantization/calibrate.py, how rounding is repaired in quantization/refine.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from tersenet.bricks.coded import RoundedLayer
from tersenet.bricks.opened import copied
from tersenet.bricks.quantized import QuantizedLayer, quantized_kind
from tersenet.errors import ModelError, SettingsError, TraceError
from tersenet.findings import is_asked, tell
from tersenet.graph.outside_reads import used_outside
from tersenet.graph.trace import trace
from tersenet.left_alone import LEFT_OUT, LeftAlone, by_layer
from tersenet.named import hits
from tersenet.numerics.ranges import weight_scales
from tersenet.numerics.samples import Inputs
from tersenet.quantization.calibrate import calibrate
from tersenet.quantization.calibration_data import warn_of_calibration
from tersenet.quantization.equalise import equalise
from tersenet.quantization.formats import Format, Storage, for_storage
from tersenet.quantization.nearest import fit_code
from tersenet.quantization.refine import COARSE, is_coarse, refine
from tersenet.step import Plan, Step, replace
from tersenet.task import Task

RANGES = ("mse", "minmax", "percentile", "divergence")
ROUNDING = ("auto", "nearest", "repaired", "learned")
# Said where the settings leave it to the data, and there are none.
NOTHING_TO_REPAIR_ON = (
    "there are no calibration inputs to repair the rounding of weights on, so each went to the nearest; give some, "
    "which need no labels, or rounding: nearest"
)
_INTEGERS = {f"int{bits}": bits for bits in range(2, 9)}


@dataclass(frozen=True, kw_only=True)
class Quantize(Step):
    """Quantizes convolutions and linear layers, and with `activations` everything between them, to integers.

    With activations, batch norms are folded on the way, zero-padding shortcuts become convolutions, and the root
    becomes a `torch.fx.GraphModule` that shares its layers with the model; the model's outputs stay float. Weights of
    fewer than 8 bits are then computed with as int8 are: the file is smaller, and as fast as with int8.

    A convolution that `only` or `skip` leaves out stays float here, but ONNX Runtime rounds its weights by itself where
    it stands between two rounded values.

    Args:
        weights: int2 to int8, fp16, bf16, fp8_e4m3, fp8_e5m2, pot2 to pot8 (powers of two), kmeans1 to kmeans8 (a
            codebook for each layer), pq (product quantization), ternary, or binary1 to binary4 (sums of scaled signs).
            With activations: int2 to int8 or ternary.
        activations: int2 to int8, or None for weights only (smaller, not faster).
        ranges: how far a grid reaches: "mse" (least squared error), "minmax" (everything), or of activations
            "percentile" and "divergence" (least change of the distribution, after TensorRT); weights then take "mse".
            Repaired rounding chooses the grids of weights by itself.
        percentile: share of the values inside the range, in percent; only for ranges="percentile".
        samples: how many calibration samples.
        rounding: "nearest"; "repaired", column by column with the layer's inputs in view (second order); "learned", up
            or down by gradients (AdaRound; codes without a grid are repaired); "auto", repaired in layers of fewer than
            8 bits where there are calibration inputs, else nearest.
        correct_bias: whether the shift of each layer's mean output is taken back: by its bias, or where a batch norm
            follows by the norm's statistics. None does so where layers are repaired or learned.
        equalise: whether channels are evened out between layers first (cross-layer equalisation), where only ReLUs
            lie between; with activations a clip at 6 becomes a ReLU for it. Norms in between prevent it: fold them.
        formats: other formats for single layers: pattern, as in `only` -> format, or "float" to leave them.
        spare: how many of the layers whose rounding alone hurts most get int8 instead; with int8, float.
        offer: formats that a search may pick for single layers beside `weights`, such as [int4, int3].
        granularity: what shares a scale, of integer weights alone: "channel", "tensor", or a number of inputs.
        symmetric: whether integer weights alone lie around zero; False is a grid with a zero point.
        piece: of pq, how many weights make a piece; fewer where that does not divide a layer's inputs.
        pieces: of pq, how many pieces a layer's codebook has at most, 2 to 256.
    """

    several_inputs: ClassVar[bool] = True
    family: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "quantizes weights, and activations to integers, after training"
    serves: ClassVar[tuple[str, ...]] = ("conv", "linear")
    needs: ClassVar[str] = "inputs"
    looks_back: ClassVar[bool] = True
    makes_layers: ClassVar[bool] = True
    naming: ClassVar[tuple[str, ...]] = ("only", "skip", "formats")

    weights: str = "int8"
    activations: str | None = "int8"
    ranges: str = "mse"
    percentile: float = 99.99
    samples: int = 512
    rounding: str = "auto"
    correct_bias: bool | None = None
    equalise: bool = False
    formats: Mapping[str, str] = dataclasses.field(default_factory=dict)
    spare: int = 0
    offer: tuple[str, ...] = ()
    granularity: str | int = "channel"
    symmetric: bool = True
    piece: int = 4
    pieces: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "offer", tuple(self.offer))
        if self.offer and self.weights not in _INTEGERS:
            raise SettingsError(f"offer goes with weights int2 to int8, got {self.weights!r}; choose one of them")
        for name in (self.weights, *self.offer, *(each for each in self.formats.values() if each != "float")):
            integers = name in _INTEGERS or Format.named(name).kind == "ternary"
            if self.activations is not None and not integers:
                raise SettingsError(
                    f"{name} weights have no integer kernels; give activations: null, or weights int2 to int8 or "
                    "ternary"
                )
        if self.activations is not None and self.activations not in _INTEGERS:
            raise SettingsError(f"activations must be int2 to int8, or null (weights only), got {self.activations!r}")
        if self.ranges not in RANGES:
            raise SettingsError(f"ranges must be one of {', '.join(RANGES)}, got {self.ranges!r}")
        if not 50 < self.percentile <= 100:
            raise SettingsError(f"percentile must lie in (50, 100], got {self.percentile}; 100 is min-max")
        if self.rounding not in ROUNDING:
            raise SettingsError(f"rounding must be one of {', '.join(ROUNDING)}, got {self.rounding!r}")
        for name, least in (("spare", 0), ("samples", 1), ("piece", 2), ("pieces", 2)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.pieces > 256:
            raise SettingsError(f"pieces must be at most 256, so that a code is one byte, got {self.pieces}")
        sized = isinstance(self.granularity, int) and not isinstance(self.granularity, bool) and self.granularity >= 1
        if not sized and self.granularity not in ("channel", "tensor"):
            raise SettingsError(
                f"granularity must be channel, tensor or a number of inputs per group, got {self.granularity!r}"
            )
        named = (self.weights, *self.offer, *self.formats.values())
        idle = {} if "pq" in named else dict.fromkeys(("piece", "pieces"), "pq weights")
        if self.ranges != "percentile":
            idle["percentile"] = "ranges: percentile"
        if self.activations is None and self.rounding == "repaired":
            idle["ranges"] = "activations, or rounding nearest or learned"
        super().__post_init__(**idle)
        if self.activations is None and self.ranges in ("percentile", "divergence"):
            raise SettingsError(
                f"ranges is {self.ranges!r}, which is for activations; weights alone take mse or minmax"
            )
        if self.activations is not None and (self.granularity != "channel" or not self.symmetric):
            raise SettingsError(
                "granularity and symmetric are for weights alone, since integer kernels have one scale for each output "
                "and no zero point; give activations: null"
            )

    def format_of(self, path: str, layer: nn.Module) -> str:
        """The format of one layer, or "float"."""
        for pattern, name in self.formats.items():
            if hits(pattern, path, layer):
                return name
        return self.weights

    def data_needed(self) -> str:
        asked = self.rounding not in ("auto", "nearest") or self.correct_bias
        return "inputs" if self.activations is not None or asked or self.spare > 0 else "nothing"

    def choices(self, model: nn.Module, task: Task) -> dict[str, list[Any]]:
        """Path -> its format, then those of `offer`; of a layer that reads the model's input "float" as well.

        Float pays there now and then: a convolution of three channels has no good int8 kernel. Layers between two
        rounded values have no such choice, because ONNX Runtime rounds them whatever the file says.
        """
        from tersenet.quantization.sensitivity import layers_at_input, layers_to_choose

        found: dict[str, list[Any]] = {}
        if self.offer:
            for path, own in layers_to_choose(self, model, task).items():
                found[path] = [own, *(name for name in self.offer if name != own)]
        if self.activations is not None:
            for path, layer in layers_at_input(self, model, task):
                found.setdefault(path, [self.format_of(path, layer)]).append("float")
        return found

    def sensitivities(self, model: nn.Module, task: Task, images: Inputs) -> dict[str, dict[Any, float]]:
        """path -> format -> divergence when this layer alone is rounded so; 0 for "float"."""
        from tersenet.quantization.sensitivity import find_sensitivities

        return find_sensitivities(self, model, task, images)

    def bits_of(self, setting: Any) -> int | None:
        return None if setting == "float" else Format.named(setting).bits

    def chosen(self, picked: Mapping[str, Any]) -> Quantize:
        floats = tuple(path for path, name in picked.items() if name == "float")
        formats = {
            path: name for path, name in picked.items() if name not in ("float", self.formats.get(path, self.weights))
        }
        return dataclasses.replace(self, skip=(*self.skip, *floats), formats={**formats, **self.formats}, offer=())

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """{"layers": {path: scheme}}, and with activations the input, the points and what stays float.

        Raises:
            ModelError: on weights of 16 bits, with activations.
        """
        if self.activations is not None:
            _refuse_half(model)
        if self.spare:
            from tersenet.quantization.sensitivity import spared

            instead = "float" if self.weights == "int8" else "int8"
            better = dict.fromkeys(spared(self, model, task), instead)
            return dataclasses.replace(self, spare=0, formats={**better, **self.formats}).plan(model, task)
        if self.activations is not None:
            from tersenet.quantization.activations import plan_activations

            return plan_activations(model, task.example, self)
        layers: dict[str, dict[str, Any]] = {}
        floats: dict[str, str] = {}
        # Layers of torch in a row read nothing of each other; what else holds layers, or is the user's own, may.
        in_a_row = all(
            type(module) is nn.Sequential or (not module._modules and type(module).__module__.startswith("torch.nn."))
            for module in model.modules()
        )
        outside = {} if in_a_row else used_outside(model, task.example)
        for path, module in model.named_modules():
            if quantized_kind(module) is None or not self.matches(path, module) or path in outside:
                continue
            name = self.format_of(path, module) if self.formats else self.weights
            if name == "float":
                floats[path] = "left out by formats"
            elif name in _INTEGERS and self.symmetric and self.granularity == "channel":
                layers[path] = {"weights": name}
            else:
                storage = Storage(self.granularity, self.symmetric, self.piece, self.pieces)
                entry = storage.entry(name, tuple(module.weight.shape))
                if entry is None:
                    floats[path] = "too small for pieces"
                else:
                    layers[path] = entry
        return {"layers": layers, **({"float": floats} if floats else {})} if layers else {}

    def left_alone(self, model: nn.Module, plan: Plan, task: Task) -> LeftAlone | None:
        """The layers with weights that stay float."""
        outside = used_outside(model, task.example) if self.activations is None else {}

        def why(path: str, layer: nn.Module) -> str | None:
            if path in plan.get("layers", {}):
                return None
            if path in plan.get("float", {}):
                said = str(plan["float"][path])
                return LEFT_OUT if said == "left out by only or skip" else f"stay float: {said}"
            if quantized_kind(layer) is not None and not self.matches(path, layer):
                return LEFT_OUT
            if quantized_kind(layer) is not None:
                return outside.get(path, "stay float: the forward does not call them")
            return f"stay float: there is no integer kernel for {type(layer).__name__}"

        return by_layer(model, why)

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Swaps the bricks in. Until `fit` has run (or a state dict is loaded) the scales are placeholders."""
        if plan and plan.get("input") is not None:
            from tersenet.quantization.activations import apply_activations

            return apply_activations(model, plan)
        swaps: dict[str, nn.Module] = {}
        for path, entry in plan.get("layers", {}).items():
            layer = model.get_submodule(path)
            kind = quantized_kind(layer)
            if kind is None:
                raise SettingsError(
                    f"the plan quantizes {path}, which is {type(layer).__name__} here; it is another model's"
                )
            bits = _INTEGERS.get(entry["weights"], 8)
            swaps[path] = (
                for_storage(layer, entry) if "code" in entry else kind.of(layer, input_quantized=False, bits=bits)
            )
        return replace(model, swaps)

    def watch(self, model: nn.Module, task: Task) -> Callable[[nn.Module], None] | None:
        """Where it costs much, says where and what helps against it, tried (quantization/remedies.py)."""
        named = (self.weights, *self.formats.values())
        coarse = any(name != "float" and Format.named(name).bits < COARSE for name in named)
        looks = self.data_needed() == "inputs" or self.granularity != "channel" or (self.rounding == "auto" and coarse)
        if not looks or not is_asked(task.quiet):
            return None
        from tersenet.quantization.remedies import diagnose

        before = copied(model)  # weights are changed in place
        return lambda made: tell(diagnose(self, before, made, task), task.quiet)

    def fit(self, model: nn.Module, task: Task) -> None:
        """Chooses what codes share, then the ranges of activations on `task.calibration(samples)`; then repairs.

        Raises:
            DataError: when there is no calibration data, or it holds values that are not finite.
            ModelError: when weights or activations are not finite.
        """
        bricks = {
            path: module for path, module in model.named_modules() if isinstance(module, QuantizedLayer | RoundedLayer)
        }
        for path, brick in bricks.items():
            if not bool(torch.isfinite(brick.weight).all()):
                raise ModelError(f"the weights of {path or 'the layer'} hold NaN or infinity; load finite weights")
        if self.equalise and bricks:
            equalise(trace(model, task.example))
        for brick in bricks.values():
            if isinstance(brick, QuantizedLayer):
                method = "minmax" if self.ranges == "minmax" else "mse"
                brick.weight_scale.copy_(weight_scales(brick.weight, brick.bits, method))
            else:
                fit_code(brick.code, brick.weight, self.ranges)
        quantized = self.activations is not None and any(
            isinstance(brick, QuantizedLayer) and brick.input_quantized for brick in bricks.values()
        )
        rounding, correct_bias = "nearest", bool(self.correct_bias)  # the default where all is int8
        if self.rounding != "auto" or self.weights != "int8" or self.formats:
            rounding, correct_bias = self._refining(bricks.values(), task)
        refined = bool(bricks) and (rounding != "nearest" or correct_bias)
        if quantized or refined or (bricks and self.spare):
            warn_of_calibration(task, self.samples)
        if quantized:
            calibrate(model, task, self.ranges, self.percentile, self.samples)
        if refined and self._refine(model, task, rounding, correct_bias) and quantized:  # layers give other values now
            calibrate(model, task, self.ranges, self.percentile, self.samples)

    def _refining(self, bricks: Collection[nn.Module], task: Task) -> tuple[str, bool]:
        """(rounding, whether biases are corrected) for these layers and data: what "auto" and None stand for."""
        rounding = self.rounding
        if rounding == "auto" and not any(map(is_coarse, bricks)):
            rounding = "nearest"
        elif rounding == "auto" and not task.has_inputs:
            tell([NOTHING_TO_REPAIR_ON], task.quiet)
            rounding = "nearest"
        return rounding, rounding != "nearest" if self.correct_bias is None else self.correct_bias

    def _refine(self, model: nn.Module, task: Task, rounding: str, correct_bias: bool) -> bool:
        """Whether it was done: by default a model of weights alone need not be one that can be captured."""
        try:
            refine(model, task, rounding, correct_bias, self.samples)
        except TraceError as error:
            if self.data_needed() == "inputs":
                raise
            tell([f"the rounding of weights cannot be repaired, so each went to the nearest: {error}"], task.quiet)
            return False
        return True


def _refuse_half(model: nn.Module) -> None:
    """Raises ModelError on weights of 16 bits: ranges are calibrated in float32, where squares do not overflow."""
    for path, weight in model.named_parameters():
        if weight.dtype in (torch.float16, torch.bfloat16):
            raise ModelError(
                f"{path} is {str(weight.dtype).removeprefix('torch.')}, and int8 is made of float32 networks; "
                "call model.float() and give float32 inputs"
            )
