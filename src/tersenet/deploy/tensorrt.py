"""ONNX files for TensorRT: explicit symmetric quantization, and the rules that such a file must keep.

TensorRT's integers are signed and have no zero point, and it fuses by other rules than ONNX Runtime, so an int8 model
gets a file of its own. NVIDIA, "Working with Quantized Types" and "Explicit Quantization":
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html

What changes against the file for ONNX Runtime, and with it what the model computes (`symmetric`):
- A grid of 0..255 becomes one of -128..127 around 0 that reaches as far, so values after a ReLU keep 7 of their 8 bits.
  A grid that lies within -128..127 steps of 0 already, as one of 4 bits does, stays as it is.
- The ReLU is no longer part of the rounding and is written out; TensorRT merges it with the convolution.
- Where a convolution goes into an addition it is not rounded before: TensorRT adds inside of the convolution's kernel.
- Biases stay float32.

There is no TensorRT here to build an engine: the file is held to the rules (`broken_rules`) and its numbers to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from tersenet.bricks.quantized import Int8Layer
from tersenet.bricks.quantizer import Quantizer
from tersenet.deploy.folded import folded_graph
from tersenet.deploy.merged_additions import rounded_for_addition
from tersenet.deploy.onnx import QuantizeDequantize, to_onnx_operators, write_onnx
from tersenet.errors import ExportError, require
from tersenet.graph.capture import Example
from tersenet.numerics.rounding import fake_quantize
from tersenet.task import Preparation

LOW, HIGH = -128, 127
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ROUNDING = ("QuantizeLinear", "DequantizeLinear")
_MOVES = ("Transpose", "Reshape")  # between a weight and its layer


class SymmetricQuantizer(nn.Module):
    """Rounds to signed integers around 0: y = clamp(round(x / scale), -128, 127) * scale; any shape.

    Args:
        ends: between which values x is kept first, where the grid of 8 bits reaches further than it should.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, ends: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.ends = ends

    @classmethod
    def of(cls, quantizer: Quantizer) -> SymmetricQuantizer:
        """The one that reaches as far as an affine quantizer does."""
        zero = int(quantizer.zero_point)
        below, above = zero - quantizer.low, quantizer.high - zero
        scale = float(quantizer.scale)
        ends = (-below * scale, above * scale) if quantizer.bits < 8 else None
        return cls(quantizer.scale * max(1.0, max(below, above) / HIGH), ends)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.ends is None else x.clamp(*self.ends)
        return fake_quantize(x, self.scale, 0, LOW, HIGH)


def symmetric(model: nn.Module, example: Example) -> fx.GraphModule:
    """What a TensorRT file computes, as a module of PyTorch; the model is left as it was.

    Args:
        model: any module; quantized by us or not.
        example: (N, ...), or all inputs; only their shapes and types are used.
    Raises:
        TraceError: when the forward cannot be captured.
    """
    graph = folded_graph(model, example)
    for path, module in list(graph.named_modules()):
        if isinstance(module, Quantizer):
            graph.add_submodule(path, SymmetricQuantizer.of(module))
        elif isinstance(module, Int8Layer) and module.input_quantized:
            graph.add_submodule(path, _with_float_bias(module))
    for node, layer in rounded_for_addition(graph, SymmetricQuantizer):
        node.replace_all_uses_with(layer)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def export_tensorrt(
    model: nn.Module,
    example: Example,
    path: str | Path,
    preparation: Preparation | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes a model as an ONNX file for TensorRT, with a dynamic batch, and holds it to the rules.

    Arguments and errors are those of `tersenet.deploy.onnx.export_onnx`. What is written computes what
    `symmetric(model, example)` does.

    Raises:
        ExportError: also when the file would break a rule; says which.
    """
    require("onnx", "onnx", "write ONNX files")
    graph = symmetric(model, example)
    for name, module in list(graph.named_modules()):
        if isinstance(module, SymmetricQuantizer):
            zero = torch.zeros((), dtype=torch.int8, device=module.scale.device)
            rounded: nn.Module = QuantizeDequantize(module.scale, zero)
            if module.ends is not None:
                rounded = nn.Sequential(nn.Hardtanh(*module.ends), rounded)
            graph.add_submodule(name, rounded)
    to_onnx_operators(graph)
    path = write_onnx(graph, example, path, preparation, metadata, type(model).__name__)
    if broken := broken_rules(path):
        path.unlink()
        raise ExportError(f"{type(model).__name__} could not be written for TensorRT: {broken[0]}")
    return path


def _with_float_bias(layer: Int8Layer) -> Int8Layer:
    with torch.device("meta"):
        new = type(layer)(**{**layer.config(), "input_quantized": False})
    new.weight, new.weight_scale, new.bias = layer.weight, layer.weight_scale, layer.rounded_bias()
    return new.train(layer.training)


class _File:
    """An ONNX graph with its constants and who makes and reads each value."""

    def __init__(self, path: str | Path) -> None:
        onnx = require("onnx", "onnx", "read ONNX files")
        model = onnx.load(path)
        self.opset = {entry.domain: entry.version for entry in model.opset_import}
        self.nodes = list(model.graph.node)
        self.constants: dict[str, np.ndarray] = {
            tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer
        }
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in model.graph.output}
        self.attribute = {
            id(node): {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
            for node in self.nodes
        }

    def is_constant(self, name: str) -> bool:
        """A stored tensor, or one made of stored tensors by rounding and moving alone."""
        if name in self.constants:
            return True
        node = self.makers.get(name)
        return node is not None and node.op_type in (*_ROUNDING, *_MOVES) and self.is_constant(node.input[0])

    def rounded(self, name: str) -> bool:
        """Whether a value comes out of DequantizeLinear, moved at most."""
        node = self.makers.get(name)
        if node is not None and node.op_type in _MOVES and self.is_constant(name):
            return self.rounded(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"


def broken_rules(path: str | Path) -> list[str]:
    """What in an ONNX file is not as TensorRT's explicit quantization asks for; empty when all is well.

    1. Opset 13 to 20, standard operators only, and none of the integer ones (QLinearConv, ConvInteger, ...).
    2. Every scale is a stored positive float32; every zero point is a stored int8 0, which QuantizeLinear must write
       out, since one that is left out means uint8 to it.
    3. Activations have one scale; weights one per output channel (axis 0), and stay within -127..127.
    4. Each QuantizeLinear is read by DequantizeLinear alone, with its own scale.
    5. All inputs of a weighted operator (Conv, Gemm, MatMul) but the bias are rounded, or none is: half rounded runs in
       float. The bias is float32.
    6. A weighted operator's result is not rounded in front of the ReLU or the addition that TensorRT merges it with.
    7. Of the inputs of an addition that reads rounded values, or the result of a weighted operator that does, one at
       most is not rounded, and that is such a result.

    Raises:
        MissingExtra: when onnx is not installed.
    """
    file = _File(path)
    rules: list[Callable[[_File], list[str]]] = [
        _operators, _numbers, _per_channel, _pairs, _weighted, _merged, _additions
    ]  # fmt: skip
    return [broken for rule in rules for broken in rule(file)]


def _operators(file: _File) -> list[str]:
    found = []
    opset = file.opset.get("", file.opset.get("ai.onnx", 0))
    if not 13 <= opset <= 20:
        found.append(f"opset {opset} is not one of 13 to 20")
    for node in file.nodes:
        if node.domain not in ("", "ai.onnx"):
            found.append(f"{_called(node)} is of the domain {node.domain}")
        elif node.op_type.startswith("QLinear") or node.op_type.endswith("Integer"):
            found.append(f"{_called(node)} is an integer operator; TensorRT reads rounding and float operators only")
    return found


def _numbers(file: _File) -> list[str]:
    found = []
    for node in _of(file, *_ROUNDING):
        scale = file.constants.get(node.input[1])
        if scale is None or scale.dtype != np.float32 or not ((scale > 0) & np.isfinite(scale)).all():
            found.append(f"the scale of {_called(node)} is not a stored positive float32")
        if len(node.input) < 3 and node.op_type == "DequantizeLinear":
            continue  # 0, of the type of what it reads
        zero = file.constants.get(node.input[2]) if len(node.input) > 2 else None
        if zero is None or zero.dtype != np.int8 or zero.any():
            found.append(f"the zero point of {_called(node)} is not a stored int8 0")
    return found


def _per_channel(file: _File) -> list[str]:
    found = []
    for node in _of(file, *_ROUNDING):
        scale = file.constants.get(node.input[1], np.ones(()))
        value = file.constants.get(node.input[0])
        if not file.is_constant(node.input[0]):
            if scale.size != 1:
                found.append(f"{_called(node)} rounds activations with {scale.size} scales; one is allowed")
        elif value is not None and node.op_type == "DequantizeLinear":
            axis = file.attribute[id(node)].get("axis", 1)
            if scale.ndim != 1 or axis != 0 or len(scale) != len(value):
                found.append(f"the weights of {_called(node)} do not have one scale per output channel")
            if value.dtype != np.int8 or (value == -128).any():
                found.append(f"the weights of {_called(node)} are not int8 within -127..127")
    return found


def _pairs(file: _File) -> list[str]:
    found = []
    for node in _of(file, "QuantizeLinear"):
        readers = file.readers.get(node.output[0], [])
        if node.output[0] in file.outputs or any(reader.op_type != "DequantizeLinear" for reader in readers):
            found.append(f"{_called(node)} is read by more than DequantizeLinear")
        scale = file.constants.get(node.input[1])
        for reader in readers:
            other = file.constants.get(reader.input[1]) if len(reader.input) > 1 else None
            if scale is not None and other is not None and not np.array_equal(scale, other):
                found.append(f"{_called(reader)} has another scale than {_called(node)} before it")
    return found


def _weighted(file: _File) -> list[str]:
    found = []
    for node in _of(file, *_WEIGHTED):
        rounded = [file.rounded(name) for name in node.input[:2]]
        if any(rounded) and not all(rounded):
            found.append(f"{_called(node)} reads rounded {('weights', 'activations')[rounded[0]]} only")
        if len(node.input) > 2 and node.input[2] and node.op_type != "MatMul":
            bias = file.constants.get(node.input[2])
            if bias is None or bias.dtype != np.float32:
                found.append(f"the bias of {_called(node)} is not stored as float32")
    return found


def _merged(file: _File) -> list[str]:
    found = []
    for node in _of(file, "QuantizeLinear"):
        before = file.makers.get(node.input[0])
        if before is None or before.op_type not in _WEIGHTED:
            continue
        behind = [
            reader
            for dequantize in file.readers.get(node.output[0], [])
            for reader in file.readers.get(dequantize.output[0], [])
        ]
        if behind and all(reader.op_type in ("Relu", "Clip") for reader in behind):
            found.append(f"{_called(before)} is rounded in front of {_called(behind[0])}")
        for reader in behind:
            others = [name for name in reader.input if file.makers.get(name) not in (None, *_rounded_from(file, node))]
            if reader.op_type == "Add" and len(behind) == 1 and others and all(map(file.rounded, others)):
                found.append(f"{_called(before)} is rounded in front of {_called(reader)}, as is its other input")
    return found


def _rounded_from(file: _File, node: Any) -> list[Any]:
    return file.readers.get(node.output[0], [])


def _additions(file: _File) -> list[str]:
    found = []
    for node in _of(file, "Add"):
        if any(map(file.is_constant, node.input)):
            continue
        plain = [file.makers.get(name) for name in node.input if not file.rounded(name)]
        merged = [maker is not None and maker.op_type in _WEIGHTED for maker in plain]
        in_integers = [maker for maker in plain if maker is not None and _reads_rounded(file, maker)]
        if len(plain) == 1 and not merged[0]:
            found.append(f"{_called(node)} adds a rounded value and one that is not, of {_made_by(plain[0])}")
        elif len(plain) > 1 and in_integers:
            other = next(maker for maker in plain if maker is not in_integers[0])
            found.append(f"{_called(node)} adds to {_called(in_integers[0])} what is not rounded, of {_made_by(other)}")
    return found


def _reads_rounded(file: _File, node: Any) -> bool:
    return node.op_type in _WEIGHTED and file.rounded(node.input[0])


def _made_by(node: Any) -> str:
    return "the input" if node is None else _called(node)


def _of(file: _File, *kinds: str) -> list[Any]:
    return [node for node in file.nodes if node.op_type in kinds]


def _called(node: Any) -> str:
    return f"{node.op_type} {node.name or node.output[0]}"
