"""Zeros in front of a convolution become the convolution's own padding in the file.

ONNX's convolutions pad each side by itself, torch's both sides alike, so padding like TensorFlow's ("same", with a
stride) leaves a Pad behind. Runtimes have no int8 kernel for it, or move all data once more. A float file has none of
these left: the exporter's optimizer folds them. In front of a rounding it does not, and may: 0 is on every grid.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from tersenet.deploy.onnx_nodes import replace

# What may stand between: nothing, or a rounding, of fewer than 8 bits with a clip of the integers.
_ROUNDINGS: tuple[list[str], ...] = (
    [],
    ["QuantizeLinear", "DequantizeLinear"],
    ["QuantizeLinear", "Clip", "DequantizeLinear"],
)


def fold_pads(onnx: Any, graph: Any) -> None:
    """Takes each Pad out that adds zeros in front of convolutions alone, rounded between or not; in place. Exact.

    Args:
        onnx: the package.
        graph: of the file.
    """
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers: dict[str, list[Any]] = collections.defaultdict(list)
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    outputs = {value.name for value in graph.output}
    gone: set[str] = set()
    for node in graph.node:
        if node.op_type != "Pad" or (added := _zeros_added(node, constants)) is None:
            continue
        rounding: list[Any] = []
        last = node.output[0]
        while len(readers[last]) == 1 and last not in outputs and readers[last][0].op_type in _ROUNDINGS[-1]:
            rounding.append(readers[last][0])
            last = rounding[-1].output[0]
        convolutions = readers[last]
        if (
            last in outputs
            or [each.op_type for each in rounding] not in _ROUNDINGS
            or not all(_pads_itself(each, last) for each in convolutions)
        ):
            continue
        for each in convolutions:
            _pad_more(each, added)
        gone.add(node.output[0])
        if _changes_nothing(rounding, makers.get(node.input[0]), constants):
            gone |= {each.output[0] for each in rounding}
            for each in convolutions:
                each.input[0] = node.input[0]
        else:
            rounding[0].input[0] = node.input[0]
    if gone:
        replace(graph, [node for node in graph.node if node.output[0] not in gone])


def _zeros_added(pad: Any, constants: Mapping[str, Any]) -> tuple[list[int], list[int]] | None:
    """(in front, behind) of each dimension of an image (H, W), or None where it is something else that is padded."""
    mode = next((each.s for each in pad.attribute if each.name == "mode"), b"constant")
    sizes = constants.get(pad.input[1])
    named = [*pad.input[2:], "", ""][:2]
    filled = constants.get(named[0], None if named[0] else np.zeros(()))
    if mode != b"constant" or sizes is None or named[1] or filled is None or np.any(filled != 0):
        return None
    half = len(sizes) // 2
    before, behind = sizes[:half].tolist(), sizes[half:].tolist()
    if any((*before[:2], *behind[:2])) or min(*before, *behind) < 0:
        return None
    return before[2:], behind[2:]


def _pads_itself(node: Any, name: str) -> bool:
    """Whether this is a convolution of that value, by nothing else than it, with sizes of padding written out."""
    automatic = next((each.s for each in node.attribute if each.name == "auto_pad"), b"NOTSET")
    return node.op_type == "Conv" and list(node.input).index(name) == 0 and automatic in (b"NOTSET", b"")


def _pad_more(convolution: Any, added: tuple[list[int], list[int]]) -> None:
    both = [*added[0], *added[1]]
    for attribute in convolution.attribute:
        if attribute.name == "pads":
            attribute.ints[:] = [a + b for a, b in zip(attribute.ints, both, strict=True)]
            return
    pads = convolution.attribute.add()
    pads.name, pads.type = "pads", pads.INTS
    pads.ints.extend(both)


def _changes_nothing(rounding: list[Any], maker: Any, constants: Mapping[str, Any]) -> bool:
    """Whether nothing is rounded, or only to the grid that what was padded lies on already."""
    if not rounding:
        return True
    if maker is None or maker.op_type != "DequantizeLinear" or len(rounding) != 2:
        return False
    return all(_equal(constants, a, b) for a, b in zip(maker.input[1:], rounding[0].input[1:], strict=True))


def _equal(constants: Mapping[str, Any], a: str, b: str) -> bool:
    if a not in constants or b not in constants:
        return a == b
    return constants[a].dtype == constants[b].dtype and np.array_equal(constants[a], constants[b])
