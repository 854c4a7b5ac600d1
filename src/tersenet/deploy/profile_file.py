"""The rows of an ONNX file as it is: what each operator does for one sample, read from the file alone.

A row is an operator that depends on the input, named after the weight it reads ("layer1.0.conv1" for
"layer1.0.conv1.weight"), else by its own name. Bytes are as a runtime keeps them: a value behind a DequantizeLinear, or
one that only goes into a QuantizeLinear (through a ReLU, say), is as small as the integers there. Reshapes are free.
A value whose shape cannot be inferred counts nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from tersenet.deploy.work import Key, Work
from tersenet.errors import require

_FREE = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape", "Dropout"}
_THROUGH = {"Relu", "Clip", *_FREE}
_CONVOLUTIONS = {"Conv", "ConvInteger", "QLinearConv", "FusedConv", "ConvTranspose"}
_PRODUCTS = {"MatMul", "MatMulInteger", "QLinearMatMul", "Gemm", "QGemm", "FusedMatMul", "FusedGemm"}
_WHERE_WEIGHT = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}  # else the second input


def works_of_file(proto: Any) -> tuple[list[Work], list[Key | None]]:
    """The rows of a file, and the row of each of its operators (None: it only makes a constant).

    Args:
        proto: a ModelProto; it is left as it was.
    """
    known = _File(proto)
    works: dict[Key, Work] = {}
    rows: list[Key | None] = []
    for index, node in enumerate(known.nodes):
        if all(name in known.weights for name in node.input if name):
            # The weight of a layer, on its way there: its reader's row, so that a runtime that keeps the step is seen.
            rows.append(None)
            continue
        work = known.work(node, index)
        if work.key in works:
            work = known.work(node, index, apart=True)
        works[work.key] = work
        rows.append(work.key)
    return list(works.values()), rows


class _File:
    """A file with the shapes of its values."""

    def __init__(self, proto: Any) -> None:
        onnx = require("onnx", "onnx", "read ONNX files")
        copied = type(proto)()
        copied.CopyFrom(proto)
        for value in copied.graph.input:
            first = value.type.tensor_type.shape.dim[:1]
            if first:
                first[0].dim_value = 1
        graph = onnx.shape_inference.infer_shapes(copied, data_prop=True).graph
        self.nodes = list(graph.node)
        self.attributes = {"group": 1, "transA": 0}
        size_of = {kind: onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize for kind in _kinds(graph)}
        self.values: dict[str, tuple[tuple[int, ...], int]] = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            sizes = tuple(dim.dim_value for dim in tensor.shape.dim)
            if all(sizes) and tensor.elem_type in size_of:
                self.values[value.name] = sizes, size_of[tensor.elem_type]
        # Values that do not depend on the input -> the stored tensors that went in: name -> (shape, bytes a number).
        self.weights: dict[str, dict[str, tuple[tuple[int, ...], int]]] = {
            each.name: {each.name: (tuple(each.dims), size_of[each.data_type])} for each in graph.initializer
        }
        self.makers: dict[str, Any] = {}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            if all(name in self.weights for name in node.input if name):
                stored = {name: each for source in node.input if source for name, each in self.weights[source].items()}
                self.weights.update(dict.fromkeys(node.output, stored))
            self.makers.update(dict.fromkeys(node.output, node))
            for name in node.input:
                self.readers[name].append(node)

    def work(self, node: Any, index: int, apart: bool = False) -> Work:
        """What an operator does; `apart` names it so that no other can have the name."""
        stored = {
            name: each for source in node.input if source in self.weights for name, each in self.weights[source].items()
        }
        values = [*(name for name in node.input if name and name not in self.weights), *filter(None, node.output)]
        free = node.op_type in _FREE
        path = _layer(stored) or node.name
        weight = self._weight(node)
        integer = weight is not None and weight[1] == 1 and self._size(values[0]) == 1
        return Work(
            f"{path} ({node.name or index})" if apart else path,
            node.op_type,
            params=sum(math.prod(shape) for shape, _ in stored.values() if len(shape) > 0),
            param_bytes=(read := sum(math.prod(shape) * size for shape, size in stored.values())),
            macs=self._macs(node, weight),
            weight_bytes=0 if free else read,
            activation_bytes=0 if free else sum(self._count(name) * self._size(name) for name in values),
            output_shape=self.values.get(node.output[0], ((), 0))[0],
            precision="int8" if integer else "float32",
            **self._channels(node, weight),
        )

    def _weight(self, node: Any) -> tuple[tuple[int, ...], int] | None:
        """Shape and bytes a number of the weight, as stored, of a convolution or a product with one."""
        if node.op_type not in _CONVOLUTIONS | _PRODUCTS:
            return None
        place = _WHERE_WEIGHT.get(node.op_type, 1)
        stored = self.weights.get(node.input[place], {}) if len(node.input) > place else {}
        return max(stored.values(), key=lambda each: math.prod(each[0]), default=None)

    def _macs(self, node: Any, weight: tuple[tuple[int, ...], int] | None) -> int:
        if node.op_type == "ConvTranspose" and weight is not None:
            return self._count(node.input[0]) * math.prod(weight[0][1:])
        if node.op_type in _CONVOLUTIONS and weight is not None:
            return self._count(node.output[0]) * math.prod(weight[0][1:])
        if node.op_type in _PRODUCTS and node.input[0] in self.values:
            left = self.values[node.input[0]][0]
            return self._count(node.output[0]) * left[0 if self._attribute(node, "transA") else -1]
        return 0

    def _channels(self, node: Any, weight: tuple[tuple[int, ...], int] | None) -> dict[str, int]:
        output = self.values.get(node.output[0], ((), 0))[0]
        if weight is None or len(output) < 2 or len(weight[0]) < 2:
            return {}
        if node.op_type in _CONVOLUTIONS:
            groups = self._attribute(node, "group")
            turned = node.op_type == "ConvTranspose"
            inputs = weight[0][0] // groups if turned else weight[0][1]
            return {
                "inputs": inputs,
                "outputs": output[1] // groups,
                "groups": groups,
                "positions": math.prod(output[2:]),
            }
        inputs = math.prod(weight[0]) // output[-1]
        return {"inputs": inputs, "outputs": output[-1], "positions": math.prod(output[1:-1])}

    def _attribute(self, node: Any, name: str) -> int:
        return next((int(each.i) for each in node.attribute if each.name == name), self.attributes[name])

    def _count(self, name: str) -> int:
        return math.prod(self.values[name][0]) if name in self.values else 0

    def _size(self, name: str) -> int:
        """Bytes a number of a value, as a runtime keeps it."""
        if name not in self.values:
            return 0
        maker = self.makers.get(name)
        while maker is not None and maker.op_type in _FREE:
            maker = self.makers.get(maker.input[0])
        if maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in self.values:
            return self.values[maker.input[0]][1]
        return 1 if self._only_quantized(name) else self.values[name][1]

    def _only_quantized(self, name: str) -> bool:
        readers = self.readers[name]
        return bool(readers) and all(
            node.op_type == "QuantizeLinear" or (node.op_type in _THROUGH and self._only_quantized(node.output[0]))
            for node in readers
        )


def _kinds(graph: Any) -> set[int]:
    kinds = {each.data_type for each in graph.initializer}
    kinds |= {value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    return {kind for kind in kinds if kind}


def _layer(stored: dict[str, Any]) -> str | None:
    """ "layer1.0.conv1" where "layer1.0.conv1.weight" is stored; our quantized files say "layer1.0.conv1.layer"."""
    named = sorted(
        (name for name, (shape, _) in stored.items() if name.endswith(".weight") and len(shape) > 0), key=len
    )
    return named[0].removesuffix(".weight").removesuffix(".layer") if named else None
