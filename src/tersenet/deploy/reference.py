"""What a model says on the inputs that its files are compared on, and how far a right file may be from it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from tersenet.bricks.evaluating import evaluating
from tersenet.bricks.quantizer import Quantizer
from tersenet.deploy.folded import folded_graph
from tersenet.deploy.merged_additions import merge_additions
from tersenet.deploy.perturbed import Perturbed, flat_outputs
from tersenet.deploy.probes import probes, real_probes
from tersenet.deploy.runner import Array, Runner
from tersenet.deploy.runtimes import open_module
from tersenet.errors import DataError, ExportError
from tersenet.graph.trace import has_open_batch
from tersenet.numerics.outputs import without_value

Outputs = list[tuple[Array, ...]]  # per batch, all outputs

# Draws of noise; and how many times the largest of them may be reached. Noise that falls together is larger than its
# draws, and a file's own order of sums than our estimate of it.
_DRAWS, _FLOAT_FACTOR, _INT8_FACTOR = 2, 16.0, 1.5
# Beside that, a share of the largest output: what runtimes lose by approximating exp, erf and tanh by polynomials.
_FLOOR = 1e-5


@dataclass(frozen=True)
class Tolerance:
    """How far one output may be off: its largest error, and its root mean square over all values."""

    largest: float
    rms: float


class Reference:
    """A model, the inputs that its files are compared on, what it says there, and what a right file may say.

    Args:
        model: what the files are made of, settled. It is left as it was.
        example: (N, ...), or all inputs.
        batches: real inputs; see `probes`.
        seed: of made inputs and of noise.
    Raises:
        DataError: when there are no inputs.
    """

    def __init__(self, model: nn.Module, example: Any, batches: Iterable[Any], seed: int = 0) -> None:
        self.model, self.example, self.seed = model, example, seed
        real = real_probes(batches)
        self.real = len(real)  # samples that are not made up: the first of all
        self.batches: list[tuple[Array, ...]] = [tuple(x.cpu().numpy() for x in batch) for batch in probes(real, seed)]
        if not self.batches:
            raise DataError("there is nothing to compare on: the data is empty (0 samples); give at least one input")
        self._outputs: dict[Any, Outputs] = {}

    @property
    def samples(self) -> int:
        return sum(len(batch[0]) for batch in self.batches)

    @cached_property
    def without_value(self) -> int:
        """Of how many real samples an output of the model holds NaN."""
        rows = [
            without_value([torch.from_numpy(each) for each in part], len(batch[0]))
            for part, batch in zip(self.outputs(self.model), self.batches, strict=True)
        ]
        return int(torch.cat(rows)[: self.real].sum())

    def check_values(self, strict: bool = False) -> None:
        """Refuses a model that computes nothing.

        Args:
            strict: whether the real samples are what users will give, so that none may have NaN for an output.
        Raises:
            ExportError: when the model's outputs hold NaN, with how often.
        """
        count = self.without_value
        if count and (strict or count == self.real):
            raise ExportError(
                f"the model's outputs hold NaN for {count} of the {self.real} inputs that its files are compared on; "
                "check its weights and what it divides by or takes the logarithm or root of"
            )

    @cached_property
    def graph(self) -> fx.GraphModule:
        """The captured graph that files are written from, on the CPU."""
        example = self.example if isinstance(self.example, tuple) else (self.example,)
        example = tuple(x.cpu() for x in example)
        return folded_graph(_on_cpu(self.model), example if len(example) > 1 else example[0])

    @cached_property
    def rounds(self) -> bool:
        """Whether activations are rounded."""
        return any(isinstance(module, Quantizer) for module in self.model.modules())

    def simulations(self, runtime: str) -> Iterator[nn.Module]:
        """What a runtime may compute for the model: the model; in OpenVINO also with merged additions."""
        yield self.model
        if self.rounds and runtime == "openvino":
            yield self._merged

    @cached_property
    def _merged(self) -> fx.GraphModule:
        return merge_additions(copy.deepcopy(self.graph))

    def outputs(self, simulation: nn.Module, runner: Runner | None = None) -> Outputs:
        """All outputs of a simulation per batch; in pieces of the same size where the file's batch is fixed."""
        shape, inputs = (None, ()) if runner is None else (runner.input_shape, runner.inputs)
        if all(each.shape and each.shape[0] is None for each in inputs):
            shape, inputs = None, ()
        key = (id(simulation), shape)
        if key not in self._outputs:
            model = open_module(simulation, 1, shape, inputs)
            self._outputs[key] = [model.run_all(batch) for batch in self.batches]
        return self._outputs[key]

    @cached_property
    def tolerances(self) -> list[Tolerance]:
        """How far each output of a file may be from the model's, over all samples.

        Float files differ by float32 arithmetic in another order, which noise at each operator stands for. In int8 a
        value at the middle between two steps falls to either side; a step there shifts values behind it, of which more
        fall to the other side: in a network of 20 layers hardly an output stays, and the error does not depend on how
        few fell first. It is held to what half a step of noise at every quantizer does to the outputs. That is what
        quantization itself does to them, and right files have 0.09 to 0.48 of what is allowed (ResNets, MobileNets, a
        ViT). What is smaller than that and wrong is found at the quantizers, one by one (`stepwise`).
        """
        return self._noise(0.5 if self.rounds else 0.0, _INT8_FACTOR if self.rounds else _FLOAT_FACTOR)

    @cached_property
    def float_floor(self) -> list[float]:
        """Of each output, the error that every file may have; there is none where the output is whole."""
        return [_FLOOR * _scale(part) for part in _together(self.outputs(self.model))]

    def _noise(self, steps: float, factor: float) -> list[Tolerance]:
        plain = _together(self._run(Perturbed(self.graph, 0, rounding=0.0)))
        largest, rms = np.zeros(len(plain)), np.zeros(len(plain))
        for draw in range(_DRAWS):
            noisy = _together(self._run(Perturbed(self.graph, self.seed + draw, steps=steps)))
            for i, (a, b) in enumerate(zip(plain, noisy, strict=True)):
                error = difference(a, b)
                error = error[np.isfinite(error)]
                largest[i] = max(largest[i], error.max(initial=0.0))
                rms[i] = max(rms[i], root_mean_square(error))
        floors = [_FLOOR * _scale(part) for part in plain]
        return [
            Tolerance(factor * float(a) + floor, factor * float(b) + floor)
            for a, b, floor in zip(largest, rms, floors, strict=True)
        ]

    def allow(self, variant: nn.Module) -> None:
        """Allows a file twice what separates a variant of the model from it, such as one with weights of 16 bits."""
        pairs = zip(_together(self.outputs(self.model)), _together(self.outputs(variant)), strict=True)
        errors = [difference(a, b) for a, b in pairs]
        self.tolerances = [
            Tolerance(known.largest + 2 * float(error.max(initial=0.0)), known.rms + 2 * root_mean_square(error))
            for known, error in zip(self.tolerances, errors, strict=True)
        ]

    def _run(self, interpreter: Perturbed) -> Outputs:
        return [run(interpreter, batch) for batch in self.batches]

    def open_batch(self) -> bool:
        return has_open_batch(self.graph)


def run(interpreter: fx.Interpreter, batch: Sequence[Array]) -> tuple[Array, ...]:
    """All outputs of a graph that is interpreted, as float32."""
    graph = interpreter.module
    with evaluating(graph), torch.inference_mode():
        outputs = interpreter.run(*(torch.from_numpy(x) for x in batch))
    return tuple(np.asarray(each.float().numpy()) for each in flat_outputs(graph, outputs))


def difference(expected: Array, output: Array) -> Array:
    """|expected - output|; 0 where both are NaN or the same infinity, infinite where one side alone is."""
    with np.errstate(invalid="ignore"):
        found = np.abs(expected.astype(np.float64) - output)
    found[(expected == output) | (np.isnan(expected) & np.isnan(output))] = 0.0
    return np.nan_to_num(found, nan=np.inf, posinf=np.inf)


def root_mean_square(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0


def _together(outputs: Outputs) -> list[Array]:
    """Of each output, the values of all batches, flat."""
    return [np.concatenate([each.reshape(-1) for each in part]) for part in zip(*outputs, strict=True)]


def _scale(values: Array) -> float:
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def _on_cpu(model: nn.Module) -> nn.Module:
    device = next((each.device for each in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return model if device.type == "cpu" else copy.deepcopy(model).cpu()
