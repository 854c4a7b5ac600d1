"""What went wrong in quantizing: channels that a shared step flushes, layers that rounding ruins, ranges that cut off.

Judged on calibration images, by running the float network and the quantized one side by side. A layer's own error is
what rounding its weights, or the value that it reads, adds to its output, as a share of the variance of each channel;
what a range cuts off is a share of the squared values. Neither says what the score will be: that is for the test set.
What to do against it is tried in quantization/remedies.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersenet.bricks.coded import RoundedLayer
from tersenet.bricks.evaluating import evaluating
from tersenet.bricks.quantized import QuantizedLayer
from tersenet.bricks.quantizer import Quantizer
from tersenet.graph.trace import trace
from tersenet.quantization.side_by_side import SideBySide, float_output
from tersenet.task import Task

# Shares of the variance (20 dB is 0.01) and of the squared values from which on a place is named.
RUINS, CUTS = 0.1, 0.05
# A channel is flushed when rounding costs more than this share of its variance; all of it is 1.
_FLUSHED = 0.5
# Of a value that no layer reads directly: the share of flushed channels from which on it is named.
_MANY = 0.25
_MOST = 3  # places named of a kind


@dataclass(frozen=True)
class Flushed:
    """Channels of one value that are lost in the step that all channels share.

    Args:
        place: what the value is called.
        makers: paths of the layers that the value comes from; () of the model's input, and of what is made of a value
            that is rounded already.
        readers: paths of the layers that read it.
        flushed, channels: how many channels are lost, of how many that vary.
        step: of the grid.
        apart: the widest range of a channel over the middle one.
        worst: the reader that loses most of its output by it; "" where no layer reads the value directly.
        share: what that reader loses, of its output's variance; without one, the share of channels lost.
    """

    place: str
    makers: tuple[str, ...]
    readers: tuple[str, ...]
    flushed: int
    channels: int
    step: float
    apart: float
    worst: str
    share: float

    def said(self) -> str:
        behind = f"; {self.worst} loses {100 * self.share:.0f} % of its output by it" if self.worst else ""
        return (
            f"{self.place}: {self.flushed} of {self.channels} channels are flushed to zero by the step of "
            f"{self.step:.2g} that all of them share, because the widest reaches {self.apart:,.0f} times as far as the "
            f"middle one{behind}"
        )


@dataclass(frozen=True)
class Findings:
    """What a look at a quantized network found.

    Args:
        errors: path of a layer -> what rounding its weights costs, a share of its output's variance, 0 to 1.
        cuts: name of a grid -> the share of the squared values that its range cuts off.
        bits: path -> bits of the weights, where they are integers or codes.
        flushed: values with channels that are lost, the worst first.
    """

    errors: dict[str, float]
    cuts: dict[str, float]
    bits: dict[str, int]
    flushed: tuple[Flushed, ...] = ()

    @property
    def ruined(self) -> list[str]:
        """Paths of the layers that rounding their weights ruins, the worst first."""
        found = [path for path, error in self.errors.items() if error > RUINS]
        return sorted(found, key=self.errors.__getitem__, reverse=True)

    @property
    def cut_off(self) -> list[str]:
        """Names of the grids that cut off much, the worst first."""
        found = [name for name, share in self.cuts.items() if share > CUTS]
        return sorted(found, key=self.cuts.__getitem__, reverse=True)

    def verdicts(self) -> list[str]:
        """One sentence for each of the worst places; [] where nothing stands out."""
        said = [each.said() for each in self.flushed[:_MOST]]
        for path in self.ruined[:_MOST]:
            bits = f" to {self.bits[path]} bits" if path in self.bits else ""
            said.append(
                f"{path} loses {100 * self.errors[path]:.0f} % of its output to the rounding of its weights{bits}"
            )
        for name in self.cut_off[:_MOST]:
            share = 100 * self.cuts[name]
            said.append(f"the range of {name.removesuffix('_out')} cuts off {share:.0f} % of its values' squares")
        return said


def look(model: nn.Module, task: Task, samples: int = 32) -> Findings:
    """Runs some calibration images through a quantized model, before it is settled; touches nothing."""
    inputs = task.inputs_like(model, samples)
    with evaluating(model), torch.no_grad():
        if isinstance(model, fx.GraphModule) and any(isinstance(each, Quantizer) for each in model.modules()):
            graph = model  # our own; to trace it again takes longer than to run it
        else:
            graph = trace(model, tuple(x[:2] for x in inputs))
        job = _Look(graph)
        job.run(*inputs)
    return Findings(job.errors, job.cuts, job.bits, job.flushed())


def listed(paths: tuple[str, ...] | list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


class _Look(SideBySide):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.errors: dict[str, float] = {}
        self.cuts: dict[str, float] = {}
        self.bits: dict[str, int] = {}
        self.channels: dict[fx.Node, tuple[int, int, float]] = {}  # quantizer -> flushed, alive, apart
        self.losses: dict[fx.Node, dict[str, float]] = {}  # quantizer -> reader -> what it loses
        self.unrounded: dict[fx.Node, Tensor] = {}  # what quantizers read, until the layers behind them have run

    def visit(self, node: fx.Node, layer: Any, was: Tensor, now: Tensor) -> None:
        path = str(node.target)
        if isinstance(layer, QuantizedLayer | RoundedLayer):
            wanted, found = float_output(layer, now), layer(now)
            self.errors[path] = _lost(wanted, found, layer)
            bits = layer.bits if isinstance(layer, QuantizedLayer) else getattr(layer.code, "bits", None)
            if bits is not None:
                self.bits[path] = bits
            source: Any = node.args[0]
            if source in self.unrounded:
                before = float_output(layer, self.unrounded[source])
                self.losses[source][path] = _lost(before, wanted, layer)
                if self._last_reader(source) is node:
                    del self.unrounded[source]
        elif isinstance(layer, Quantizer):
            self._quantizer(node, layer, now)

    def _quantizer(self, node: fx.Node, layer: Quantizer, x: Tensor) -> None:
        rest = x - x.clamp(*layer.reach)
        squares = float(x.square().sum())
        name = str(node.target).rpartition(".")[2]
        share = float(rest.square().sum()) / squares if squares > 0 else 0.0
        self.cuts[name] = max(share, self.cuts.get(name, 0.0))
        if x.dim() < 2:
            return
        # Linear layers read the last dimension, convolutions the second.
        readers = [self._layer_of(user) for user in node.users]
        last = x.dim() == 3 or any(isinstance(reader, nn.Linear) for reader in readers)
        rows, error = (each.movedim(-1 if last else 1, 0).flatten(1) for each in (x, layer(x) - x))
        variance = rows.var(1, correction=0)
        alive = variance > 0
        flushed = alive & (error.square().mean(1) > _FLUSHED * variance)
        if bool(flushed.any()):
            reach = rows.abs().amax(1)[alive]
            apart = float(reach.max() / reach.median())
            self.channels[node] = int(flushed.sum()), int(alive.sum()), apart
            self.losses[node] = {}
            if self._last_reader(node) is not None:
                self.unrounded[node] = x

    def _layer_of(self, node: fx.Node) -> Any:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _last_reader(self, node: fx.Node) -> fx.Node | None:
        """The last layer that reads a value directly and is visited."""
        readers = [
            user
            for user in node.users
            if isinstance(self._layer_of(user), QuantizedLayer) and self.calls[user.target] == 1
        ]
        return max(readers, default=None)

    def flushed(self) -> tuple[Flushed, ...]:
        found = []
        for node, (count, alive, apart) in self.channels.items():
            losses = self.losses[node]
            worst = max(losses, key=losses.__getitem__, default="")
            share = losses[worst] if losses else count / alive
            if share > (RUINS if losses else _MANY):
                makers = self._layers_around(node, lambda each: each.all_input_nodes, False)
                readers = self._layers_around(node, lambda each: list(each.users), True)
                step = float(self._layer_of(node).scale)
                source: Any = node.args[0]
                place = listed(makers) or ("the input" if source.op == "placeholder" else source.name)
                found.append(Flushed(place, makers, readers, count, alive, step, apart, worst, share))
        return tuple(sorted(found, key=lambda each: each.share, reverse=True))

    def _layers_around(
        self, node: fx.Node, beside: Callable[[fx.Node], list[fx.Node]], through: bool
    ) -> tuple[str, ...]:
        """The nearest layers with rounded weights on one side of a value.

        Args:
            through: whether what lies behind other quantizers counts: a value that is only added up stays rounded as
                long as the sum is.
        """
        found: dict[str, None] = {}
        seen, waiting = set(), beside(node)
        while waiting:
            each = waiting.pop(0)
            layer = self._layer_of(each)
            if each in seen or (isinstance(layer, Quantizer) and not through):
                continue
            seen.add(each)
            if isinstance(layer, QuantizedLayer | RoundedLayer):
                found[str(each.target)] = None
            else:
                waiting += beside(each)
        return tuple(found)


def _lost(wanted: Tensor, found: Tensor, layer: nn.Module) -> float:
    """What a layer's output loses of its variance: the mean over channels, since the next layer may read a small one as
    closely as a large one."""
    channels = -1 if isinstance(layer, nn.Linear) else 1
    a, b = (each.movedim(channels, 0).flatten(1) for each in (wanted, found))
    variance = a.var(1, correction=0)
    alive = variance > 0
    shares = (b - a).square().mean(1)[alive] / variance[alive]
    return float(shares.clamp(max=1).mean()) if len(shares) else 0.0
