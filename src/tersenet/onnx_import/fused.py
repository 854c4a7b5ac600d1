"""Normalizations and activations that older operator sets write as arithmetic, as the one operator that they are.

Layer norm came with operator set 17 and GELU with 20. Known as what they are they are cut and kept in float as such.
What the patterns leave without a reader is dropped with all that is unused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tersenet.onnx_import.call import Step
from tersenet.onnx_import.values import Host


class Patterns:
    """Recognizes operators among the steps of a graph.

    Args:
        steps: by order.
        constants: what is known, by name.
    """

    def __init__(self, steps: Sequence[Step], constants: Mapping[str, Host]) -> None:
        self.constants = constants
        self.makers = {name: step for step in steps for name in step.outputs}

    def replace(self, steps: Sequence[Step]) -> None:
        """Changes the last step of each pattern, in place."""
        for step in steps:
            match = self._layer_norm(step) or self._gelu(step)
            if match is not None:
                step.op, step.inputs, step.attributes = match

    def _maker(self, name: str, op: str) -> Step | None:
        step = self.makers.get(name)
        return step if step is not None and step.op == op else None

    def _number(self, name: str) -> float | None:
        """A constant of one entry."""
        known = self.constants.get(name)
        return float(known.array.reshape(-1)[0]) if known is not None and known.array.size == 1 else None

    def _with_number(self, step: Step | None) -> tuple[str, float] | None:
        """(the other input, the number) of an operator with a constant of one entry."""
        if step is None or len(step.inputs) != 2:
            return None
        for own, other in ((0, 1), (1, 0)):
            number = self._number(step.inputs[other])
            if number is not None:
                return step.inputs[own], number
        return None

    def _layer_norm(self, step: Step) -> tuple[str, list[str], dict[str, object]] | None:
        """Add(Mul(normalized, weight), bias) over the last dimension."""
        if step.op != "Add":
            return None
        for product, bias in (step.inputs, step.inputs[::-1]):
            scaled = self._maker(product, "Mul")
            if scaled is None or bias not in self.constants:
                continue
            for normalized, weight in (scaled.inputs, scaled.inputs[::-1]):
                match = self._normalized(self._maker(normalized, "Div")) if weight in self.constants else None
                shapes = {self.constants[name].array.shape for name in (weight, bias) if name in self.constants}
                if match is not None and len(shapes) == 1 and len(next(iter(shapes))) == 1:
                    return "LayerNormalization", [match[0], weight, bias], {"axis": -1, "epsilon": match[1]}
        return None

    def _normalized(self, step: Step | None) -> tuple[str, float] | None:
        """(x, epsilon) of (x - mean) / sqrt(mean((x - mean)^2) + epsilon)."""
        if step is None:
            return None
        centered, root = self._maker(step.inputs[0], "Sub"), self._maker(step.inputs[1], "Sqrt")
        if centered is None or root is None:
            return None
        x, mean = centered.inputs
        total = self._with_number(self._maker(root.inputs[0], "Add"))
        if total is None or self._mean_of(mean) != x:
            return None
        square = self._mean_of(total[0])
        if square is None or not self._is_square(square, centered):
            return None
        return x, total[1]

    def _mean_of(self, name: str) -> str | None:
        """What a mean over the last dimension is taken of."""
        step = self._maker(name, "ReduceMean")
        if step is None or not step.attributes.get("keepdims", 1):
            return None
        axes = step.attributes.get("axes")
        if axes is None and len(step.inputs) > 1 and step.inputs[1] in self.constants:
            axes = self.constants[step.inputs[1]].array.tolist()
        return step.inputs[0] if list(axes or ()) == [-1] else None

    def _is_square(self, name: str, centered: Step) -> bool:
        power = self._maker(name, "Pow")
        if power is not None:
            base, exponent = self._maker(power.inputs[0], "Sub"), self._number(power.inputs[1])
            return exponent == 2 and base is not None and base.inputs == centered.inputs
        product = self._maker(name, "Mul")
        if product is None or product.inputs[0] != product.inputs[1]:
            return False
        base = self._maker(product.inputs[0], "Sub")
        return base is not None and base.inputs == centered.inputs

    def _gelu(self, step: Step) -> tuple[str, list[str], dict[str, object]] | None:
        """x * (erf(x / sqrt(2)) + 1) * 0.5, in any order."""
        if step.op != "Mul":
            return None
        factors = list(step.inputs)
        for name in step.inputs:
            inner = self._maker(name, "Mul")
            if inner is not None and len(factors) == 2:
                factors = [each for each in factors if each != name] + inner.inputs
        halves = [name for name in factors if self._number(name) == 0.5]
        if len(factors) != 3 or len(halves) != 1:
            return None
        first, second = (name for name in factors if name != halves[0])
        for x, shifted in ((first, second), (second, first)):
            one = self._with_number(self._maker(shifted, "Add"))
            erf = self._maker(one[0], "Erf") if one is not None and one[1] == 1 else None
            if erf is not None and self._is_scaled(erf.inputs[0], x):
                return "Gelu", [x], {}
        return None

    def _is_scaled(self, name: str, x: str) -> bool:
        """Whether a value is x / sqrt(2)."""
        for op, factor in (("Div", math.sqrt(2)), ("Mul", math.sqrt(0.5))):
            match = self._with_number(self._maker(name, op))
            if match is not None and match[0] == x and math.isclose(match[1], factor, rel_tol=1e-5):
                return op != "Div" or self._number(self.makers[name].inputs[1]) is not None
        return False
