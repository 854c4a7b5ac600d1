"""ONNX files by torch's current exporter, float and quantized.

A quantized model becomes QDQ: activations uint8 per tensor (int8 around 0 for the input and for what is added up),
weights int8 initialisers and biases int32 initialisers with one DequantizeLinear each, per output channel. ONNX Runtime
and OpenVINO fuse that into integer operators. Other weights are written by onnx_weights and onnx_packing.

The export works on a copy in which everything exact that a runtime would do anyway is done: batch norms are folded
(float files too, so that comparisons are fair), a ReLU or clip that a quantizer repeats is dropped, and a mean over H
and W becomes GlobalAveragePool, for which ONNX Runtime has an integer kernel and for ReduceMean has not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tersenet.atomic import writing
from tersenet.bricks.coded import StoredLayer
from tersenet.bricks.quantized import Int8Conv2d, Int8Layer, Int8Linear
from tersenet.bricks.quantizer import Quantizer
from tersenet.deploy.average_pools import rewrite_average_pools
from tersenet.deploy.exported_once import exported_once
from tersenet.deploy.folded import folded_graph
from tersenet.deploy.int8_rewrites import rewrite_for_int8
from tersenet.deploy.kept_in_float import keep_in_float
from tersenet.deploy.onnx_decompositions import decompose, replace_resizes
from tersenet.deploy.onnx_packing import make_floats_once, pack_constants
from tersenet.deploy.onnx_pads import fold_pads
from tersenet.deploy.onnx_weights import StoredAsOnnx, unpack_weights
from tersenet.errors import ExportError, require
from tersenet.graph.capture import Example, export
from tersenet.graph.outputs import OUTPUTS, names, return_flat
from tersenet.graph.points import clip_bounds, is_global_pool, signed_quantizers
from tersenet.task import Preparation

OPSET = 20  # what torch 2.13 writes by itself; both runtimes read it
_LARGEST = 2**31 - 2**20  # a protobuf file must stay under 2 GiB


def export_onnx(
    model: nn.Module,
    example: Example,
    path: str | Path,
    preparation: Preparation | None = None,
    metadata: Mapping[str, str] | None = None,
    pack: bool = True,
    floats: Collection[str] = (),
    shared_int8: bool = False,
) -> Path:
    """Writes a model as one ONNX file with a dynamic batch; the model is left as it was.

    The input is called "input"; of several, each as in the forward. The output is called "output", further ones
    "output_1" and so on; those that stand in a dict by their keys. How they stand is kept as metadata tersenet.outputs.

    Args:
        model: any module; quantized by us or not.
        example: (N, ...) input, or all inputs, of the type and shape that the file will take.
        path: where to; written whole or not at all.
        preparation: stored as metadata tersenet.mean, .std, .size and .labels, each as JSON.
        metadata: more metadata, stored under its own names.
        pack: whether weights that have few values take few bytes, and those of layers with float input are made at
            loading (onnx_packing). Without, integers stay int8 behind DequantizeLinear.
        floats: names of nodes of the captured graph that no runtime is to compute in integers; what they compute stays.
        shared_int8: as `shared` of `signed_quantizers`: for OpenVINO alone.
    Raises:
        TraceError: when the forward cannot be captured.
        ExportError: when the exporter fails, or the file would be larger than 2 GiB.
        MissingExtra: when onnx or onnxscript is not installed.
    """
    graph = folded_graph(model, example)
    keep_in_float(graph, floats)
    drop_repeated_clips(graph)
    quantized = any(isinstance(module, Quantizer) for module in graph.modules())
    rewrite_average_pools(graph, quantized)
    if quantized:
        rewrite_for_int8(graph)
    to_onnx_operators(graph, shared_int8)
    return write_onnx(graph, example, path, preparation, metadata, type(model).__name__, pack)


def write_onnx(
    graph: fx.GraphModule,
    example: Example,
    path: str | Path,
    preparation: Preparation | None,
    metadata: Mapping[str, str] | None,
    name: str,
    pack: bool = False,
) -> Path:
    """Writes a graph as it is, nothing folded or replaced, which returns its outputs flat afterwards; the rest as in
    `export_onnx`.

    Args:
        name: of the model, for errors.
        pack: as in `export_onnx`.
    """
    onnx = require("onnx", "onnx", "write ONNX files")
    require("onnxscript", "onnx", "write ONNX files")
    structure = return_flat(graph)
    inputs = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
    inputs = ["input"] if len(inputs) == 1 else inputs
    given = example if isinstance(example, tuple) else (example,)

    def made() -> Any:
        rounds = any(isinstance(module, QuantizeDequantize) for module in graph.modules())
        program = export(graph, example)
        with _silence():
            try:
                found = torch.onnx.export(
                    decompose(program, rounds), given, dynamo=True, opset_version=OPSET, verbose=False,
                    input_names=inputs,
                )  # fmt: skip
            except Exception as error:  # the exporter raises many kinds; each becomes one sentence
                raise ExportError(f"{name} could not be written as ONNX: {_reason(error)}") from error
        assert found is not None
        return found.model_proto

    proto = exported_once(graph, given, made)
    own = {} if structure == 0 else {OUTPUTS: json.dumps(structure)}
    _finish(onnx, proto, names(structure), {**_prepared(preparation), **own, **(metadata or {})}, pack)
    if proto.ByteSize() > _LARGEST:
        raise ExportError(f"the ONNX file would have {proto.ByteSize()} bytes; one file can hold less than 2 GiB")
    _check(onnx, proto, name)
    path = Path(path)
    with writing(path) as temporary:
        temporary.write_bytes(proto.SerializeToString())
    return path


def _check(onnx: Any, proto: Any, name: str) -> None:
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # the checker and its shape inference have their own kinds
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"{name} was written as ONNX that does not hold to ONNX's rules: {reason}") from error


def _reason(error: BaseException) -> str:
    """What went wrong at the bottom: the exporter's own errors only say at which step, with advice to its makers."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:300] if lines else type(error).__name__


def _prepared(preparation: Preparation | None) -> dict[str, str]:
    if preparation is None:
        return {}
    return preparation.metadata()


def drop_repeated_clips(graph: fx.GraphModule) -> None:
    """Takes out each ReLU or clip that a quantizer behind it repeats. Exact."""
    for node in list(graph.graph.nodes):
        if _repeats(graph, node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()


def to_onnx_operators(graph: fx.GraphModule, shared_int8: bool = False) -> None:
    """Puts what becomes ONNX's own operators in place of our bricks, of global pools and of hard activations, which
    torch would trace through their parts, a sixth of a second for each; only for the exporter. Arguments as in
    `export_onnx`."""
    for node in list(graph.graph.nodes):
        made: Any = _hard_activation(graph, node)
        arguments = node.args[:1]
        if is_global_pool(graph, node):
            made, arguments = _global_average_pool, (node.args[0], len(node.meta["shape"]))
        if made is None:
            continue
        with graph.graph.inserting_after(node):
            new = graph.graph.call_function(made, arguments)
        new.meta = dict(node.meta)  # what comes behind is told by the shapes in front of it
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    replace_resizes(graph)
    signed = signed_quantizers(graph, shared_int8)
    for name, module in list(graph.named_modules()):
        if isinstance(module, Quantizer):
            graph.add_submodule(name, QuantizeDequantize.of(module, name in signed))
        elif isinstance(module, Int8Layer):
            graph.add_submodule(name, _Dequantized(module))
        elif isinstance(module, StoredLayer):
            graph.add_submodule(name, StoredAsOnnx(module))
    graph.recompile()


def _repeats(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a clip lies between an operator and a quantizer that cuts off at least as much."""
    bounds = clip_bounds(graph, node)
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if bounds is None or user is None or user.op != "call_module":
        return False
    quantizer = graph.get_submodule(str(user.target))
    if not isinstance(quantizer, Quantizer):
        return False
    scale, zero_point = float(quantizer.scale), int(quantizer.zero_point)
    low, high = (quantizer.low - zero_point) * scale, (quantizer.high - zero_point) * scale
    # Half a step beyond the bound still rounds to it.
    return bounds[0] <= low + scale / 2 and high - scale / 2 <= bounds[1] and low >= bounds[0] - 1e-6 * scale


def _hard_activation(graph: fx.GraphModule, node: fx.Node) -> Callable[[Tensor], Tensor] | None:
    """What writes a hard swish or sigmoid, in place or not (nobody reads what was written into); None for others."""
    if node.op == "call_module":
        layer = graph.get_submodule(str(node.target))
        return _HARD_LAYERS.get(type(layer))
    return _HARD_OPERATORS.get(node.target) if node.op == "call_function" else None


def _hard_swish(x: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic("HardSwish", (x,), dtype=x.dtype, shape=x.shape)


def _hard_sigmoid(x: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic("HardSigmoid", (x,), {"alpha": 1 / 6, "beta": 0.5}, dtype=x.dtype, shape=x.shape)


_HARD_LAYERS: dict[type, Callable[[Tensor], Tensor]] = {nn.Hardswish: _hard_swish, nn.Hardsigmoid: _hard_sigmoid}
_HARD_OPERATORS: dict[Any, Callable[[Tensor], Tensor]] = {
    torch.ops.aten.hardswish.default: _hard_swish, torch.ops.aten.hardswish_.default: _hard_swish,
    torch.ops.aten.hardsigmoid.default: _hard_sigmoid, torch.ops.aten.hardsigmoid_.default: _hard_sigmoid,
}  # fmt: skip


def _global_average_pool(x: Tensor, dims: int) -> Tensor:
    """(N, C, H, W) -> (N, C, 1, 1) for dims = 4, (N, C) for dims = 2."""
    n, channels = x.shape[:2]
    pooled = torch.onnx.ops.symbolic("GlobalAveragePool", (x,), dtype=x.dtype, shape=(n, channels, 1, 1))
    return pooled if dims == 4 else pooled.flatten(1)


class QuantizeDequantize(nn.Module):
    """A quantizer as the pair QuantizeLinear, DequantizeLinear, to the type of its zero point.

    Below 8 bits a Clip of the integers is between. The integer operators of the runtimes work on 8 bits. A clip in
    front of QuantizeLinear would keep them from fusing the convolution before it, and a clip of integers does not.
    """

    scale: Tensor
    zero_point: Tensor
    low: Tensor | None
    high: Tensor | None

    def __init__(self, scale: Tensor, zero_point: Tensor, ends: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.clipped = ends is not None
        low_high = None if ends is None else torch.tensor(ends, dtype=zero_point.dtype, device=scale.device)
        self.register_buffer("low", None if low_high is None else low_high[0].clone())
        self.register_buffer("high", None if low_high is None else low_high[1].clone())

    @classmethod
    def of(cls, quantizer: Quantizer, signed: bool) -> QuantizeDequantize:
        """The pair for one quantizer.

        Args:
            signed: whether it is written as int8 where its range lies around 0 (`signed_quantizers`).
        """
        if signed and quantizer.bits == 8 and int(quantizer.zero_point) == 128:
            return cls(quantizer.scale, torch.zeros_like(quantizer.zero_point, dtype=torch.int8))
        return cls(
            quantizer.scale, quantizer.zero_point, (quantizer.low, quantizer.high) if quantizer.high < 255 else None
        )

    def forward(self, x: Tensor) -> Tensor:
        q = torch.onnx.ops.symbolic(
            "QuantizeLinear", (x, self.scale, self.zero_point), dtype=self.zero_point.dtype, shape=x.shape
        )
        if self.clipped:
            q = torch.onnx.ops.symbolic("Clip", (q, self.low, self.high), dtype=q.dtype, shape=x.shape)
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", (q, self.scale, self.zero_point), dtype=x.dtype, shape=x.shape
        )


class _Dequantized(nn.Module):
    """A settled layer whose integers pass through DequantizeLinear."""

    zero_point: Tensor | None
    bias_scale: Tensor

    def __init__(self, layer: Int8Layer) -> None:
        super().__init__()
        self.layer = layer
        # ONNX Runtime makes QGemm only of a weight with a zero point; QLinearConv does without.
        zeros = torch.zeros(len(layer.weight), dtype=torch.int8, device=layer.weight.device)
        self.register_buffer("zero_point", zeros if isinstance(layer, Int8Linear) else None)
        if layer.input_scale is not None and layer.bias is not None:
            self.register_buffer("bias_scale", layer.bias_scale)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        weight = _dequantize_linear(layer.weight, layer.weight_scale, self.zero_point)
        bias = layer.bias
        if bias is not None and layer.input_scale is not None:
            bias = _dequantize_linear(bias, self.bias_scale)
        if isinstance(layer, Int8Linear):
            return F.linear(x, weight, bias)
        assert isinstance(layer, Int8Conv2d)
        return layer._conv_forward(x, weight, bias)


def _dequantize_linear(q: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    inputs = (q, scale) if zero_point is None else (q, scale, zero_point)
    return torch.onnx.ops.symbolic("DequantizeLinear", inputs, attrs={"axis": 0}, dtype=scale.dtype, shape=q.shape)


def _finish(onnx: Any, proto: Any, called: Sequence[str], metadata: Mapping[str, str], pack: bool) -> None:
    """Names, metadata, and one batch dimension called "batch"; what the exporter left for debugging is dropped."""
    graph = proto.graph
    fold_pads(onnx, graph)
    own = [value.name for value in graph.output]
    others = {value.name for value in (*graph.input, *graph.initializer)}
    others |= {name for node in graph.node for name in node.output if name not in own}
    if others & set(called):
        called = ["output" if i == 0 else f"output_{i}" for i in range(len(own))]
    outputs = dict(zip(own, called, strict=True))
    for node in graph.node:
        node.input[:] = [outputs.get(name, name) for name in node.input]
        node.output[:] = [outputs.get(name, name) for name in node.output]
        node.doc_string = ""
        del node.metadata_props[:]
    for value in graph.output:
        value.name = outputs[value.name]
    del graph.value_info[:], graph.metadata_props[:]
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output):
        del value.metadata_props[:]
        for dim in value.type.tensor_type.shape.dim:
            if batch and dim.dim_param == batch:
                dim.dim_param = "batch"
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, dict(metadata))
    unpack_weights(onnx, proto)
    if pack:
        make_floats_once(onnx, proto)
        pack_constants(onnx, proto)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter warns about packages that are not installed and about torch's own deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    loggers += [logging.getLogger("torch.onnx._internal.exporter._registration")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
