"""One call of an operator: its inputs and attributes as a handler reads them, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.errors import ModelError
from tersenet.onnx_import.values import Host, Value, scalar


@dataclass(eq=False)
class Step:
    """One operator of a file.

    Args:
        op: the operator's name in ONNX's own domain.
        attributes: as Python's own values, arrays, or the steps of a subgraph (`Branch`).
        inputs: names of values, "" where one is left out.
        outputs: likewise.
        name: of the node in the file.
        scopes: paths of the module that the exporter wrote the node for, the innermost last.
        version: of the operator set that it is read in.
    """

    op: str
    attributes: dict[str, Any]
    inputs: list[str]
    outputs: list[str]
    name: str
    scopes: tuple[str, ...] = ()
    version: int = 0
    read: set[str] = field(default_factory=set)

    @property
    def label(self) -> str:
        return f"operator {self.op} (node {self.name or self.outputs[0]!r})"


@dataclass(eq=False)
class Branch:
    """A subgraph without inputs: a branch of an If."""

    steps: list[Step]
    outputs: list[str]


class Holder(Protocol):
    """The network that runs, as a handler knows it.

    Args:
        file: its name, for errors.
        recorded: shapes of values with the file's own batch, where that is fixed.
        used: names of values that anything reads.
        inputs_by_order: names of the inputs.
    """

    file: str
    recorded: dict[str, tuple[int, ...]]
    used: set[str]
    inputs_by_order: list[str]

    def constant(self, step: Step, value: Host) -> Tensor: ...
    def layer(self, step: Step, make: Callable[[], nn.Module], constants: Sequence[Host]) -> nn.Module: ...


class Call:
    """What a handler gets.

    Args:
        network: that runs; it holds the layers and the constants.
        step: the operator.
        values: its inputs by order, None where one is left out.
    """

    def __init__(self, network: Holder, step: Step, values: Sequence[Value]) -> None:
        self.network, self.step, self.values = network, step, values
        self.version = step.version

    def refuse(self, reason: str) -> NoReturn:
        """Raises ModelError, which names the operator, the node and the file."""
        raise ModelError(f"{self.network.file} cannot be imported: {self.step.label} {reason}")

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute; one of a node that no handler reads is refused."""
        self.step.read.add(name)
        return self.step.attributes.get(name, default)

    def ignore(self, *names: str) -> None:
        """Attributes that change nothing in evaluation."""
        self.step.read.update(names)

    def one_of(self, name: str, allowed: Sequence[Any], default: Any) -> Any:
        """An attribute that may have these values alone."""
        value = self.attribute(name, default)
        if value not in allowed:
            self.refuse(f"has {name}={value!r}; supported are {', '.join(map(repr, allowed))}")
        return value

    def has(self, index: int) -> bool:
        return index < len(self.values) and self.values[index] is not None

    def uses(self, output: int) -> bool:
        """Whether anything reads one of the further outputs."""
        return output < len(self.step.outputs) and self.step.outputs[output] in self.network.used

    def tensor(self, index: int) -> Tensor:
        """An input as a tensor; a constant becomes a parameter or buffer of the network."""
        value = self.values[index]
        if isinstance(value, Host):
            return self.network.constant(self.step, value)
        if value is None:
            self.refuse(f"lacks its input {index + 1}")
        return value

    def operand(self, index: int, rank: int) -> Any:
        """An input for arithmetic with a tensor of so many dimensions: a constant of one entry as a number."""
        value = self.values[index]
        if isinstance(value, Host) and value.array.size == 1 and value.array.ndim <= rank:
            return scalar(value.array)
        return self.tensor(index)

    def constant(self, index: int) -> Host | None:
        """An input where it is a constant of numbers; None where it is computed or left out."""
        value = self.values[index] if index < len(self.values) else None
        return value if isinstance(value, Host) and not value.symbolic else None

    def host(self, index: int, what: str) -> np.ndarray:
        """An input that has to be known: a constant, or made of sizes."""
        value = self.values[index]
        if not isinstance(value, Host):
            self.refuse(f"computes its {what} from the values of a tensor; export the model with a constant one")
        return value.array

    def ints(self, index: int, what: str) -> list[Any]:
        return [scalar(np.asarray(entry, dtype=object)) for entry in np.atleast_1d(self.host(index, what)).flat]

    def axes(self, index: int, default: Any = None) -> list[int] | None:
        """Axes, which older operator sets have as an attribute and newer ones as an input."""
        old = self.attribute("axes")
        if old is not None:
            return [int(axis) for axis in old]
        return [int(axis) for axis in self.ints(index, "axes")] if self.has(index) else default

    def rank(self, *indices: int) -> int:
        """The most dimensions among some inputs."""
        return max((_rank(self.values[index]) for index in indices), default=0)

    def layer(self, make: Callable[[], nn.Module], *constants: Host | None) -> nn.Module:
        """The layer of this node, made at the first call; nodes of the same constants and settings share one."""
        return self.network.layer(self.step, make, [each for each in constants if each is not None])

    def recorded_shape(self, index: int) -> tuple[int, ...] | None:
        """The shape of an input when the file ran with its own batch; None where that is open."""
        return self.network.recorded.get(self.step.inputs[index])

    def recorded_output_shape(self) -> tuple[int, ...] | None:
        """The shape of the first output when the file ran with its own batch."""
        return self.network.recorded.get(self.step.outputs[0])


def _rank(value: Value) -> int:
    if isinstance(value, Host):
        return value.array.ndim
    return 0 if value is None else value.dim()


def spatial(x: Tensor) -> list[int]:
    """H, W, ... of (N, C, H, W, ...)."""
    return list(x.shape[2:])


def parameter(array: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.array(array)), requires_grad=array.dtype.kind == "f")
