"""What a file weighs, against sums by hand."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from tersenet.search.weigh import count_macs, memory_bytes


def file_of(nodes: list[onnx.NodeProto], constants: dict[str, list[int]], out: list[int]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        [
            helper.make_tensor(
                name, TensorProto.INT8 if name.endswith("8") else TensorProto.FLOAT, dims, [0] * _count(dims)
            )
            for name, dims in constants.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()


def _count(dims: list[int]) -> int:
    count = 1
    for size in dims:
        count *= size
    return count


CONV = helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1])


def test_a_chain() -> None:
    """Input and output of the convolution are alive at once, 4 and 16 channels of 8 x 8; later two of 16."""
    file = file_of([CONV, helper.make_node("Relu", ["a"], ["y"])], {"w": [16, 4, 3, 3]}, ["batch", 16, 8, 8])
    weights, plane = 16 * 4 * 9 * 4, 8 * 8 * 4
    assert memory_bytes(file, (1, 4, 8, 8)) == weights + 32 * plane
    assert memory_bytes(file, (3, 4, 8, 8)) == weights + 3 * 32 * plane
    assert count_macs(file, (3, 4, 8, 8)) == 16 * 4 * 9 * 64


def test_what_is_read_later_stays_alive() -> None:
    """x is added at the end: it lives beside the two tensors in between."""
    nodes = [CONV, helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Add", ["b", "x"], ["y"])]
    file = file_of(nodes, {"w": [4, 4, 3, 3]}, ["batch", 4, 8, 8])
    assert memory_bytes(file, (1, 4, 8, 8)) == 4 * 4 * 9 * 4 + 3 * 4 * 8 * 8 * 4


def test_rounding_is_fused() -> None:
    """x, rounded to bytes, dequantized inside of the convolution; the convolution's float result is never there."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z8"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z8"], ["d"]),
        helper.make_node("Conv", ["d", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["a", "s", "z8"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "s", "z8"], ["y"]),
    ]
    file = file_of(nodes, {"w": [4, 4, 3, 3], "s": [], "z8": []}, ["batch", 4, 8, 8])
    plane = 4 * 8 * 8
    constants = 4 * 4 * 9 * 4 + 4 + 1
    assert memory_bytes(file, (1, 4, 8, 8)) == pytest.approx(constants + 4 * plane + plane)
