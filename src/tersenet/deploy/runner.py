"""A file that is open in a runtime: its inputs by order, all its outputs, any batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tersenet.errors import DataError

Array = np.ndarray
Inputs = Array | Sequence[Array]


@dataclass(frozen=True)
class Input:
    """One input of a file.

    Args:
        name: as in the file.
        shape: (N, ...) with None for each open size; N may be fixed too, and is then no limit (`Runner.outputs`).
        dtype: what it takes, as numpy names it; None where that is not known.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str | None = None

    @property
    def said(self) -> str:
        return "x".join("N" if size is None else str(size) for size in self.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.shape) > 0 and all(
            size in (None, got) for size, got in zip(self.shape[1:], shape[1:], strict=True)
        )


@dataclass(frozen=True)
class Runner:
    """A file (or a module) that is open in a runtime.

    Args:
        runtime: a name of `RUNTIMES`.
        path: the file; None for a module in memory.
        input_shape: of the first input, (N, ...) with None for each open size; None where it is not known.
        call: the bare call, inputs (N, ...) by order -> all outputs in order, or the only one; what measuring times. No
            checks.
        threads: how many the runtime may use.
        metadata: what the file says about itself, such as its labels.
        inputs: all inputs by order, as the file has them; empty where they are not known.
    """

    runtime: str
    path: Path | None
    input_shape: tuple[int | None, ...] | None
    call: Callable[..., tuple[Array, ...] | Array] = field(repr=False)
    threads: int = 1
    metadata: dict[str, str] = field(default_factory=dict, repr=False)
    inputs: tuple[Input, ...] = ()

    @property
    def name(self) -> str:
        return str(self.path) if self.path is not None else "the module in memory"

    def run(self, x: Inputs) -> Array:
        """The first output, as float32; the rest as in `run_all`."""
        return self.run_all(x)[0]

    def run_all(self, inputs: Inputs) -> tuple[Array, ...]:
        """All outputs in the model's flattened order, as float32; the rest as in `outputs`."""
        return tuple(np.asarray(output, dtype=np.float32) for output in self.outputs(inputs))

    def outputs(self, inputs: Inputs) -> tuple[Array, ...]:
        """All outputs in the model's flattened order, of the types that the runtime gives.

        Any batch: a file with a fixed one is called in pieces, the last one padded with zeros.

        Args:
            inputs: (N, ...), or all inputs by order; floats are converted to float32, or to what the file takes.
        Raises:
            DataError: when the inputs do not fit, or an output of a file with a fixed batch is not per sample.
        """
        arrays = self._fitting(inputs if isinstance(inputs, tuple | list) else (inputs,))
        n = len(arrays[0]) if arrays[0].ndim else 0
        batch = next((each.shape[0] for each in self.expected if each.shape and each.shape[0] is not None), None)
        if batch is None or batch == n:
            return self._called(arrays)
        pieces = []
        for start in range(0, n, batch):
            part = [array[start : start + batch] for array in arrays]
            gap = batch - len(part[0])
            padded = [np.concatenate([each, np.zeros((gap, *each.shape[1:]), each.dtype)]) for each in part]
            outputs = self._called(padded)
            if any(not output.ndim or len(output) != batch for output in outputs):
                raise DataError(
                    f"{self.name} takes batches of {batch} and has an output that is not one per sample, so {n} "
                    "samples cannot be put together from pieces; give that batch"
                )
            pieces.append([output[: batch - gap] for output in outputs])
        return tuple(np.concatenate(part) for part in zip(*pieces, strict=True))

    @property
    def expected(self) -> tuple[Input, ...]:
        """All inputs by order, as far as they are known."""
        return self.inputs or (() if self.input_shape is None else (Input("input", self.input_shape),))

    def _called(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        outputs = self.call(*arrays)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def _fitting(self, given: Sequence[Any]) -> list[Array]:
        """The inputs as the file takes them. Raises DataError when they do not fit."""
        expected = self.expected
        if not expected:
            return [as_taken(np.asarray(x), None) for x in given]
        if len(given) != len(expected):
            raise DataError(
                f"{self.name} takes {len(expected)} input{'s' if len(expected) > 1 else ''} "
                f"({', '.join(each.name for each in expected)}), got {len(given)}"
            )
        arrays = []
        for x, each in zip(map(np.asarray, given), expected, strict=True):
            if not each.fits(x.shape) or len(x) == 0:
                which = "input" if len(expected) == 1 else f"input {each.name!r}"
                raise DataError(f"the {which} of {self.name} must be {each.said}, got {'x'.join(map(str, x.shape))}")
            arrays.append(as_taken(x, each))
        return arrays


def as_taken(x: Array, into: Input | None) -> Array:
    """An input in the type that it is taken in: integers and booleans stay what they are, unless floats are taken.

    Raises:
        DataError: when integers are taken and `x` holds other numbers.
    """
    if into is None or into.dtype is None:
        return np.ascontiguousarray(x, dtype=x.dtype if x.dtype.kind in "iub" else np.float32)
    dtype = np.dtype(into.dtype)
    if dtype.kind in "iub" and x.dtype.kind == "f" and not np.array_equal(x, np.rint(x)):
        raise DataError(f"input {into.name!r} takes {dtype}, got numbers that are not whole; give integers")
    return np.ascontiguousarray(x, dtype=dtype)


def as_array(tensor: Any) -> Array:
    """A tensor as numpy: floats of any width as float32; integers and booleans as they are."""
    tensor = tensor.detach().cpu()
    return np.asarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())
