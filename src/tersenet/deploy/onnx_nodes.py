"""Operators of ONNX that make a constant of packed numbers, once, when a runtime loads the file.

Numbers are cut into digits of 8, 4, 2 and 1 bits (3 bits are 2 + 1), the digits of one width are packed into bytes; a
byte is looked up in a table of its digits (Gather), and the digits are put together. All hangs on constants alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WIDTHS = (8, 4, 2, 1)
# Bytes of the operators that take a weight's numbers apart, about.
OPERATORS_TAKE = 600


def width(count: int) -> int:
    """Bits that tell `count` values apart."""
    return max(1, (count - 1).bit_length())


def replace(graph: Any, nodes: list[Any]) -> None:
    """Other operators, and only the constants that they read."""
    kept = [copy.deepcopy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


class ConstantNodes:
    """Operators for one constant of a file after another.

    Args:
        onnx: the package.
        graph: of the file; new constants are added to it, operators are not.
    """

    def __init__(self, onnx: Any, graph: Any) -> None:
        self.onnx, self.graph = onnx, graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.made: list[Any] = []
        self.name = ""

    def begin(self, name: str) -> None:
        """Operators for the constant of a name follow; `made` holds them afterwards."""
        self.made, self.name = [], name

    def found(self, book: str, size: Sequence[int], numbers: str, shape: list[int], out: str) -> None:
        """The entries of a codebook by their numbers; one of two dimensions holds a row for each output.

        Not by GatherElements, which OpenVINO does not work out at loading.
        """
        if len(size) == 2:
            begins = self.shared(
                f"rows_{size[0]}_{size[1]}", np.arange(size[0], dtype=np.int32)[:, None] * np.int32(size[1])
            )
            numbers = self.node("Add", [self.reshaped(numbers, [size[0], -1]), begins])
            book = self.reshaped(book, [-1])
        self.reshaped(self.node("Gather", [book, numbers], axis=0), shape, out)

    def numbers(self, numbers: NDArray[np.uint8], bits: int) -> str:
        """(n,) int32: packed numbers, taken apart again."""
        flat, low, parts = numbers.reshape(-1), 0, []
        for width in _WIDTHS:
            if bits & width:
                digits = (flat >> low) & (2**width - 1)
                parts.append((self._digits(digits.astype(np.uint8), width), low))
                low += width
        total = ""
        for digits, shift in parts:
            if shift:
                digits = self.node("Mul", [digits, self.shared(f"times_{2**shift}", np.array(2**shift, np.int32))])
            total = self.node("Add", [total, digits]) if total else digits
        return total

    def _digits(self, digits: NDArray[np.uint8], width: int) -> str:
        """(n,) int32 digits of some bits, from bytes that hold 8 / width of them, the first one lowest."""
        each = 8 // width
        padded = np.pad(digits, (0, -len(digits) % each)).reshape(-1, each)
        packed = (padded << (width * np.arange(each, dtype=np.uint8))).sum(axis=1).astype(np.uint8)
        taken = self.node("Cast", [self.own(f"packed_{width}", packed)], to=self.onnx.TensorProto.INT32)
        if each == 1:
            return taken
        held = (np.arange(256)[:, None] >> (width * np.arange(each))) & (2**width - 1)
        table = self.shared(f"digits_{width}", held.astype(np.uint8))
        found = self.node("Cast", [self.node("Gather", [table, taken], axis=0)], to=self.onnx.TensorProto.INT32)
        flat = self.reshaped(found, [-1])
        if padded.size == len(digits):
            return flat
        ends = [self.shared(f"at_{value}", np.array([value], np.int64)) for value in (0, len(digits))]
        return self.node("Slice", [flat, *ends])

    def reshaped(self, value: str, shape: list[int], out: str = "") -> str:
        name = "shape_" + "_".join(map(str, shape)).replace("-1", "flat")
        return self.node("Reshape", [value, self.shared(name, np.array(shape, np.int64))], out)

    def node(self, operator: str, inputs: list[str], out: str = "", **attributes: Any) -> str:
        out = out or f"tersenet_{self.name}_{len(self.made)}"
        self.made.append(self.onnx.helper.make_node(operator, inputs, [out], **attributes))
        return out

    def own(self, name: str, value: NDArray[Any]) -> str:
        return self.shared(f"{self.name}_{name}", value)

    def shared(self, name: str, value: NDArray[Any]) -> str:
        """A constant by its name, which all weights may use."""
        name = f"tersenet_{name}"
        if name not in self.constants:
            self.constants[name] = self.onnx.numpy_helper.from_array(value, name)
            self.graph.initializer.append(self.constants[name])
        return name
