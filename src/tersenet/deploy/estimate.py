"""What one call of a file does, read from the file: multiply-adds and bytes, for an estimate of its energy."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersenet.deploy.energy import Energy, estimate
from tersenet.errors import TersenetError


def estimate_file(path: Path, inputs: Sequence[np.ndarray]) -> Energy | None:
    """The energy of a call on these inputs (N, ...), by order; None for a kind of file that we cannot look into."""
    suffix = path.suffix.lower()
    if suffix == ".onnx" and importlib.util.find_spec("onnx") is not None:
        return _onnx(path, [x.shape for x in inputs])
    if suffix in (".pt2", ".terse"):
        return _program(path, inputs)
    return None


def _program(path: Path, inputs: Sequence[np.ndarray]) -> Energy | None:
    import torch

    from tersenet.deploy.artifact import load_terse
    from tersenet.deploy.pt2 import read_pt2
    from tersenet.graph.costs import totals

    try:
        model = load_terse(path) if path.suffix.lower() == ".terse" else read_pt2(path)[0]
        found = totals(model, tuple(torch.from_numpy(x[:1]) for x in inputs))
    except TersenetError:
        return None
    activations = max(0, found.bytes_moved - found.param_bytes)  # weights are read once, whatever the batch
    samples = len(inputs[0])
    return estimate(found.macs * samples, found.param_bytes + activations * samples, 32)


def _onnx(path: Path, inputs: Sequence[tuple[int, ...]]) -> Energy | None:
    """Convolutions and matrix products of the graph; a quantized one is told by its int8 weights."""
    import onnx
    from onnx import shape_inference

    try:
        model = onnx.load(path)
        stored = {each.name for each in model.graph.initializer}
        taken = [each for each in model.graph.input if each.name not in stored]
        for each, shape in zip(taken, inputs, strict=True):
            for size, value in zip(each.type.tensor_type.shape.dim, shape, strict=True):
                size.dim_value = value
        graph = shape_inference.infer_shapes(model).graph
    except Exception:  # noqa: BLE001 an estimate is not worth an error: the file runs
        return None
    weights = {each.name: each for each in graph.initializer}
    shapes = {value.name: _sizes(value) for value in (*graph.value_info, *graph.output, *graph.input)}
    makers = {name: node for node in graph.node for name in node.output}
    macs = integers = 0
    moved = sum(_stored_bytes(weight) for weight in weights.values())
    for node in graph.node:
        written = math.prod(shapes.get(node.output[0]) or (0,))
        if node.op_type not in (
            "Conv",
            "Gemm",
            "MatMul",
            "ConvInteger",
            "MatMulInteger",
            "QLinearConv",
            "QLinearMatMul",
        ):
            continue
        place = 3 if node.op_type.startswith("QLinear") else 1
        name = node.input[place]
        if name in makers and makers[name].op_type == "DequantizeLinear":
            name = makers[name].input[0]
        weight = weights.get(name)
        sizes = tuple(weight.dims) if weight is not None else shapes.get(node.input[place]) or ()
        each = math.prod(sizes[1:]) if "Conv" in node.op_type else _inner(node, sizes)
        macs += written * each
        eight = weight is not None and weight.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
        integers += written * each if eight else 0
        # Its input is read and its output written, as numbers of that width.
        moved += (1 if eight else 4) * (written + math.prod(shapes.get(node.input[0]) or (0,)))
    return estimate(macs, moved, 8 if 2 * integers > macs else 32)


def _inner(node: Any, sizes: tuple[int, ...]) -> int:
    """Products summed into one output of a matrix product whose right side has these sizes."""
    if not sizes:
        return 0
    turned = any(each.name == "transB" and each.i for each in node.attribute)
    return sizes[-1] if turned or len(sizes) == 1 else sizes[-2]


def _sizes(value: Any) -> tuple[int, ...]:
    return tuple(size.dim_value for size in value.type.tensor_type.shape.dim)


def _stored_bytes(tensor: Any) -> int:
    return math.prod(tensor.dims) * (1 if tensor.data_type in (2, 3) else 4)
