"""What went wrong in quantizing, and what to do: layers that ruin the outputs, activations that are cut off.

Judged on calibration images, by running the float network and the quantized one side by side. A layer's own error is
what its rounding alone adds to its output, as a share of the output's variance; what a range cuts off is a share of
the squared values. Neither says what the score will be: that is for the test set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersenet.bricks.coded import RoundedLayer
from tersenet.bricks.evaluating import evaluating
from tersenet.bricks.quantized import QuantizedLayer
from tersenet.bricks.quantizer import Quantizer
from tersenet.graph.trace import trace
from tersenet.quantize.side_by_side import SideBySide, float_output, inputs_for
from tersenet.task import Task

# Shares of the variance (20 dB is 0.01) and of the squared values from which on a place is named.
RUINS, CUTS = 0.1, 0.05
_MOST = 3  # places named of a kind


@dataclass(frozen=True)
class Findings:
    """What a look at a quantized network found.

    Args:
        errors: path of a layer -> its own error, a share of its output's variance.
        cuts: name of a grid -> the share of the squared values that its range cuts off.
        bits: path -> bits of the weights, where they are integers or codes.
    """

    errors: dict[str, float]
    cuts: dict[str, float]
    bits: dict[str, int]

    def verdicts(self) -> list[str]:
        """One sentence each, the worst first; [] where nothing stands out."""
        said = []
        ruined = [path for path, error in self.errors.items() if error > RUINS]
        for path in sorted(ruined, key=self.errors.__getitem__, reverse=True)[:_MOST]:
            few = self.bits.get(path, 8) < 8
            remedy = (
                f"give it more bits (formats: {{{path}: int8}}), or repair its rounding (rounding: repaired)"
                if few
                else f"leave it in float (skip: [{path}]), or even out its channels first (equalise: true)"
            )
            said.append(f"{path} loses {100 * self.errors[path]:.0f} % of its output to rounding: {remedy}")
        cut = [name for name, share in self.cuts.items() if share > CUTS]
        for name in sorted(cut, key=self.cuts.__getitem__, reverse=True)[:_MOST]:
            said.append(
                f"the range of {name.removesuffix('_out')} cuts off {100 * self.cuts[name]:.0f} % of its values' "
                "squares: calibrate on more images or others (samples), or cover all that was seen (ranges: minmax)"
            )
        return said


def look(model: nn.Module, task: Task, samples: int = 32) -> Findings:
    """Runs some calibration images through a quantized model, before it is settled; touches nothing."""
    inputs = inputs_for(model, task, samples)
    with evaluating(model), torch.no_grad():
        if isinstance(model, fx.GraphModule) and any(isinstance(each, Quantizer) for each in model.modules()):
            graph = model  # our own; to trace it again takes longer than to run it
        else:
            graph = trace(model, tuple(x[:2] for x in inputs))
        job = _Look(graph)
        job.run(*inputs)
    return Findings(job.errors, job.cuts, job.bits)


def say(findings: Findings) -> None:
    """Prints the verdicts on standard error."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False)
    for text in findings.verdicts():
        console.print(f"    {text}", soft_wrap=True)


class _Look(SideBySide):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.errors: dict[str, float] = {}
        self.cuts: dict[str, float] = {}
        self.bits: dict[str, int] = {}

    def visit(self, node: fx.Node, layer: Any, was: Tensor, now: Tensor) -> None:
        path = str(node.target)
        if isinstance(layer, QuantizedLayer | RoundedLayer):
            wanted, found = float_output(layer, now), layer(now)
            variance = float(wanted.var(correction=0))
            self.errors[path] = float((found - wanted).square().mean()) / variance if variance > 0 else 0.0
            bits = layer.bits if isinstance(layer, QuantizedLayer) else getattr(layer.code, "bits", None)
            if bits is not None:
                self.bits[path] = bits
        elif isinstance(layer, Quantizer):
            rest = now - now.clamp(*layer.reach)
            squares = float(now.square().sum())
            self.cuts[path.rpartition(".")[2]] = float(rest.square().sum()) / squares if squares > 0 else 0.0
