"""LiteRT (TensorFlow Lite): `.tflite` files written by litert-torch, run by ai-edge-litert with XNNPACK.

A .tflite file has a fixed batch. litert-torch keeps PyTorch's order of axes, so inputs are (N, C, H, W) here too.
A model with rounded activations becomes integer operators with our scales and zero points, and takes its input rounded
to int8: q = round(x / scale) + zero point, both in the file. Floats can be stored in 16 bits; LiteRT computes with them
in 32. How inputs are prepared is kept behind the file's own bytes (`tersenet.deploy.trailer`).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._inductor.constant_folding import constant_fold

from tersenet.atomic import writing
from tersenet.bricks.settle import unmask
from tersenet.deploy.decomposed import LITERT, decomposed, rounds_activations, with_float_weights
from tersenet.deploy.quiet import quiet_native
from tersenet.deploy.runner import Array, Input, Runner
from tersenet.deploy.trailer import read_trailer, with_trailer
from tersenet.errors import ExportError, SettingsError, TersenetError, require
from tersenet.graph.capture import export
from tersenet.task import Preparation


def open_litert(path: Path, threads: int) -> Runner:
    """Opens a .tflite file.

    A file of integer operators takes its inputs rounded, as the file says; the runner does that, within the call.
    """
    require("ai_edge_litert", "litert", f"run {path.name}")
    with quiet_native():  # it says on standard error which delegate it takes
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
    takes, gives = interpreter.get_input_details(), interpreter.get_output_details()

    def call(*arrays: Array) -> tuple[Array, ...]:
        for x, into in zip(arrays, takes, strict=True):
            interpreter.set_tensor(into["index"], _rounded(x, into))
        interpreter.invoke()
        return tuple(interpreter.get_tensor(out["index"]) for out in gives)  # copies

    inputs = tuple(
        Input(into["name"], tuple(int(size) for size in into["shape"]), None if _has_grid(into) else _name_of(into))
        for into in takes
    )
    return Runner("litert", path, inputs[0].shape, call, threads, read_trailer(path), inputs)


def _name_of(into: dict[str, Any]) -> str:
    return np.dtype(into["dtype"]).name


def _has_grid(into: dict[str, Any]) -> bool:
    """Whether an input is taken rounded: as integers that stand for floats, by a scale."""
    return np.dtype(into["dtype"]).kind in "iu" and into["quantization"][0] != 0


def _rounded(x: Array, into: dict[str, Any]) -> Array:
    if not _has_grid(into):
        return x
    kind, (scale, zero_point) = np.dtype(into["dtype"]), into["quantization"]
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    return np.asarray(np.clip(np.rint(x / np.float32(scale)) + zero_point, low, high).astype(kind))


def export_litert(
    model: nn.Module,
    example: Tensor,
    path: str | Path,
    preparation: Preparation | None = None,
    half: bool = False,
) -> Path:
    """Writes a model as a .tflite file whose batch is that of the example; the model is left as it was.

    Args:
        model: any module of one input.
        example: (N, ...) float32; only its shape is used.
        path: ends in .tflite. Written whole or not at all.
        preparation: of the inputs, kept in the file.
        half: weights of layers in float16.
    Raises:
        SettingsError: on `half` for a model with rounded activations, whose weights have 8 bits.
        TraceError: when the forward cannot be captured.
        ExportError: when the exporter fails.
        MissingExtra: when litert-torch is not installed.
    """
    with quiet_native():
        litert_torch = require("litert_torch", "litert", "write LiteRT files")
        require("ai_edge_litert", "litert", "write LiteRT files")
    if half and rounds_activations(model):
        raise SettingsError("this model has 8-bit weights and activations; float16 would make it larger: use litert")
    model = unmask(copy.deepcopy(model))
    try:
        with quiet_native(), writing(Path(path)) as temporary:
            # Our own capture: a module that came from torch.export cannot be switched to evaluation, which the
            # converter tries.
            if rounds_activations(model):
                graph, settings = decomposed(model, example, LITERT), {"quant_config": _integers()}
            else:
                graph, settings = _folded(with_float_weights(model, example), example), {}
            litert_torch.convert(graph, (example,), strict_export=False, **settings).export(str(temporary))
            content = _in_half(temporary) if half else temporary.read_bytes()
            temporary.write_bytes(with_trailer(content, preparation))
    except TersenetError:
        raise
    except Exception as error:  # the exporter raises many kinds; each becomes one sentence
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ExportError(f"{type(model).__name__} could not be written for LiteRT: {reason}") from error
    return Path(path)


def _integers() -> Any:
    """The converter's setting that makes integer operators of quantize, operator, dequantize."""
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
    from litert_torch.quantize.quant_config import QuantConfig

    # What the quantizer is set to matters only where the converter quantizes itself, and we have done so.
    static = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=False)
    return QuantConfig(pt2e_quantizer=PT2EQuantizer().set_global(static))


def _in_half(path: Path) -> bytes:
    """A .tflite file with the weights of its layers in float16, each read through a DEQUANTIZE operator."""
    from ai_edge_quantizer import quantizer
    from ai_edge_quantizer.qtyping import TFLOperationName

    made = quantizer.Quantizer(str(path))
    for name in ("CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE", "FULLY_CONNECTED"):
        made.add_weight_only_config(
            ".*", getattr(TFLOperationName, name), 16, algorithm_key=quantizer.AlgorithmName.FLOAT_CASTING
        )
    return bytes(made.quantize().quantized_model)


def _folded(graph: fx.GraphModule, example: Tensor) -> fx.GraphModule:
    """The graph with all that depends on constants alone worked out."""
    folded = export(graph, example, dynamic_batch=False).module(check_guards=False)
    for node in list(folded.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            folded.graph.erase_node(node)
    constant_fold(folded)
    used = {node.target for node in folded.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in (*folded.named_parameters(), *folded.named_buffers()) if name not in used]:
        home, _, leaf = name.rpartition(".")
        delattr(folded.get_submodule(home), leaf)
    folded.recompile()
    return folded
