"""LiteRT (TensorFlow Lite): `.tflite` files written by litert-torch, run by ai-edge-litert with XNNPACK.

A .tflite file has a fixed batch. litert-torch keeps PyTorch's order of axes, so inputs are (N, C, H, W) here too.
How inputs are prepared is kept behind the file's own bytes (`tersenet.deploy.trailer`).
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._inductor.constant_folding import constant_fold

from tersenet.atomic import writing
from tersenet.bricks.settle import unmask
from tersenet.deploy.quiet import quiet_native
from tersenet.deploy.runtimes import Array, Runner
from tersenet.deploy.trailer import read_trailer, with_trailer
from tersenet.errors import ExportError, FileError, TersenetError, require
from tersenet.graph.trace import export, trace
from tersenet.task import Preparation


def open_litert(path: Path, threads: int) -> Runner:
    """Opens a .tflite file of one float32 input; the first output is what it gives.

    Raises:
        FileError: when it has more inputs than one.
    """
    require("ai_edge_litert", "litert", f"run {path.name}")
    with quiet_native():  # it says on standard error which delegate it takes
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    if len(inputs) != 1:
        raise FileError(f"{path} has {len(inputs)} inputs; files of one input can be run here")
    into, out = inputs[0]["index"], outputs[0]["index"]

    def call(x: Array) -> Array:
        interpreter.set_tensor(into, x)
        interpreter.invoke()
        return np.asarray(interpreter.get_tensor(out), dtype=np.float32)  # a copy

    shape = tuple(int(size) for size in inputs[0]["shape"])
    return Runner("litert", path, shape, call, threads, read_trailer(path))


def export_litert(model: nn.Module, example: Tensor, path: str | Path, preparation: Preparation | None = None) -> Path:
    """Writes a model as a .tflite file whose batch is that of the example; the model is left as it was.

    Args:
        model: any module of one input.
        example: (N, ...) float32; only its shape is used.
        path: ends in .tflite. Written whole or not at all.
        preparation: of the inputs, kept in the file.
    Raises:
        TraceError: when the forward cannot be captured.
        ExportError: when the exporter fails.
        MissingExtra: when litert-torch is not installed.
    """
    with quiet_native():
        litert_torch = require("litert_torch", "litert", "write LiteRT files")
        require("ai_edge_litert", "litert", "write LiteRT files")
    # Our own capture: a module that came from torch.export cannot be switched to evaluation, which the exporter tries.
    graph = _folded(trace(unmask(copy.deepcopy(model)), example), example)
    try:
        with quiet_native(), writing(Path(path)) as temporary:
            litert_torch.convert(graph, (example,), strict_export=False).export(str(temporary))
            temporary.write_bytes(with_trailer(temporary.read_bytes(), preparation))
    except TersenetError:
        raise
    except Exception as error:  # the exporter raises many kinds; each becomes one sentence
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ExportError(f"{type(model).__name__} could not be written for LiteRT: {reason}") from error
    return Path(path)


def _folded(graph: fx.GraphModule, example: Tensor) -> fx.GraphModule:
    """The graph with all that depends on constants alone worked out.

    The converter refuses unsigned constants, which our quantizers' zero points are. The weights of a quantized model so
    become floats on their grid: the file gives the same outputs, and is neither small nor fast for being quantized.
    """
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
