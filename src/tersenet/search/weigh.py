"""What an ONNX file weighs, read off the file: multiply-adds, and the memory that running it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# Bytes of an element, by ONNX's numbers of types; others count as 4.
_ELEMENT = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}


def count_macs(file: bytes, shape: Sequence[int]) -> int:
    """Multiply-adds of the convolutions and linear layers of an ONNX file for one sample."""
    model = _shaped(file, (1, *shape[1:]))
    sizes = {name: dims for name, (dims, _) in _values(model).items()}
    total = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            weight = sizes[node.input[1]]
            total += int(np.prod(sizes[node.output[0]][2:])) * int(np.prod(weight))
        elif node.op_type in ("Gemm", "MatMul") and node.input[1] in sizes:
            weight = sizes[node.input[1]]
            rows = sizes[node.output[0]][1:-1] if node.op_type == "MatMul" else []
            total += int(np.prod(weight)) * int(np.prod(rows))
    return total


def memory_bytes(file: bytes, shape: Sequence[int]) -> int:
    """Bytes of the constants, and the most that is alive at once between the operators, run in the file's order.

    Float values that are rounded next, or were rounded just before, are not counted: runtimes fuse the rounding.
    """
    model = _shaped(file, shape)
    values = _values(model)
    constants = {each.name for each in model.graph.initializer}
    size = {name: int(np.prod(dims)) * _ELEMENT.get(kind, 4) for name, (dims, kind) in values.items()}
    outputs = {each.name for each in model.graph.output}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in model.graph.node:
        following = [reader.op_type for name in node.output for reader in readers.get(name, [])]
        fused = node.op_type == "DequantizeLinear" or set(following) == {"QuantizeLinear"}
        for name in node.output:
            if fused and name not in outputs:
                size[name] = 0
    last = {name: index for index, node in enumerate(model.graph.node) for name in node.input}
    alive = sum(size.get(each.name, 0) for each in model.graph.input)
    peak = alive
    for index, node in enumerate(model.graph.node):
        alive += sum(size.get(name, 0) for name in node.output)
        peak = max(peak, alive)
        gone = {name for name in (*node.input, *node.output) if last.get(name, index) == index}
        alive -= sum(size.get(name, 0) for name in gone - constants - outputs)
    return sum(size[name] for name in constants) + peak


def _shaped(file: bytes, shape: Sequence[int]) -> Any:
    """The file with the sizes of all values worked out for an input of this shape."""
    import onnx

    model = onnx.load_from_string(file)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    for dim, size in zip(dims, shape, strict=True):
        dim.ClearField("dim_param")
        dim.dim_value = size
    for each in model.graph.output:
        each.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model)


def _values(model: Any) -> dict[str, tuple[list[int], int]]:
    """name -> (shape, ONNX's number of the type) of every value whose shape is known."""
    found = {}
    for each in (*model.graph.value_info, *model.graph.output, *model.graph.input):
        kind = each.type.tensor_type
        found[each.name] = ([dim.dim_value for dim in kind.shape.dim], kind.elem_type)
    for each in model.graph.initializer:
        found[each.name] = (list(each.dims), each.data_type)
    return found
