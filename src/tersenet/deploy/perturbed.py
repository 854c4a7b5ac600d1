"""A captured graph computed with noise: how far rounding alone may take a right file from its model.

No fixed number serves as a tolerance: a deep network enlarges the last digit of a float32, as it enlarges a rounding
that falls to the other side, and a shallow one does not. So the model itself is asked. Each operator's result gets
noise as large as float32 arithmetic in another order has (Monte Carlo arithmetic: Parker, Computer Science Department,
UCLA, CSD-970002, 1997); what comes out differs by what a right runtime may differ. In front of each quantizer half a
step more is added: rounded values then fall to either side at random, which is what all of them together may do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersenet.bricks.quantizer import Quantizer

aten = torch.ops.aten

# Of each value and the root mean square of its tensor: what a sum of a few hundred products in float32 differs by when
# its order does.
ROUNDING = 2.0**-21
PIECE = 2**17  # numbers that stay in a processor's cache
# Results that are whole by definition; noise on them would be cut off by an index or a conversion that follows.
_WHOLE = {
    each
    for name in ("round", "floor", "ceil", "trunc", "sign", "fix", "heaviside", "floor_divide", "one_hot")
    if hasattr(aten, name)
    for packet in (getattr(aten, name),)
    for each in (getattr(packet, overload) for overload in packet.overloads())
}


class Perturbed(fx.Interpreter):
    """Runs a captured graph with noise behind every operator that computes in floats.

    Args:
        graph: from `graph.trace.trace`, in evaluation mode; it is left as it was.
        seed: of the noise.
        rounding: the noise, as a share of each value and of the root mean square of all; 0 computes as the graph does.
        steps: uniform noise of up to this many steps in front of each quantizer.
        keep: names of the nodes whose values are kept in `kept`.
    """

    def __init__(
        self, graph: fx.GraphModule, seed: int, rounding: float = ROUNDING, steps: float = 0.0, keep: Any = ()
    ) -> None:
        super().__init__(graph)
        self.rounding, self.steps = rounding, steps
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn = torch.empty(2 * PIECE).uniform_(-1, 1, generator=self.generator)
        self.keep, self.kept = frozenset(keep), dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.rounding and _computes(n) and isinstance(value, Tensor) and value.is_floating_point():
            value = self._rounded_differently(value)
        if n.name in self.keep:
            self.kept[n.name] = value
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, Quantizer):
            return self.quantize(str(target), module, args[0])
        return super().call_module(target, args, kwargs)

    def quantize(self, path: str, quantizer: Quantizer, x: Tensor) -> Tensor:
        """One call of a quantizer; what computes it otherwise stands in for this."""
        if self.steps:
            x = self._noisy(x, 0.0, self.steps * float(quantizer.scale.abs()))
        return quantizer(x)

    def _rounded_differently(self, value: Tensor) -> Tensor:
        """With the noise of another order of sums. Of a value near zero the sum may have been large on the way, as its
        neighbors are."""
        size = float(torch.linalg.vector_norm(value)) / math.sqrt(max(1, value.numel()))
        if math.isfinite(size):
            return self._noisy(value, self.rounding, self.rounding * size)
        finite = value.isfinite()
        size = float(value[finite].square().mean().sqrt()) if bool(finite.any()) else 0.0
        return torch.where(finite, self._noisy(value.nan_to_num(0, 0, 0), self.rounding, self.rounding * size), value)

    def _noisy(self, value: Tensor, share: float, more: float) -> Tensor:
        """value + noise * (share * |value| + more), with noise uniform in -1..1.

        In pieces that stay in the processor's cache, each from another place of numbers drawn once: drawing all of them
        takes longer than the operator before.
        """
        given = value.reshape(-1)
        made = torch.empty_like(given)
        for start in range(0, len(given), PIECE):
            piece, into = given[start : start + PIECE], made[start : start + PIECE]
            at = int(torch.randint(PIECE, (), generator=self.generator))
            noise = self.drawn[at : at + len(piece)]
            if share:
                torch.addcmul(piece, torch.abs(piece, out=into), noise, value=share, out=into).add_(noise, alpha=more)
            else:  # an infinity stays one
                torch.add(piece, noise, alpha=more, out=into)
        return made.view(value.shape)


def flat_outputs(graph: nn.Module, value: Any) -> list[Tensor]:
    """The outputs of a captured graph, in order."""
    return [each for each in torch.utils._pytree.tree_leaves(value) if isinstance(each, Tensor)]


def _computes(node: fx.Node) -> bool:
    """Whether rounding happens in a node: it reads floats of the graph, and its result is not whole by definition."""
    if node.op not in ("call_function", "call_module") or node.target in _WHOLE:
        return False
    return any(source.meta.get("dtype", torch.float32).is_floating_point for source in node.all_input_nodes)
