"""ExecuTorch: `.pte` files whose layers are lowered to XNNPACK, run by ExecuTorch's own runtime.

A .pte file has a fixed batch. What XNNPACK cannot take stays in ExecuTorch's portable operators, which are slow: they
are a reference. A model with rounded activations becomes XNNPACK's integer operators with our scales and zero points,
but for layers behind the last rounding. How inputs are prepared is kept behind the file's own bytes
(`tersenet.deploy.trailer`).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.atomic import writing
from tersenet.bricks.settle import unmask
from tersenet.deploy.decomposed import EXECUTORCH, decomposed, rounds_activations, with_float_weights
from tersenet.deploy.quiet import quiet_native
from tersenet.deploy.runner import Array, Input, Runner, as_array
from tersenet.deploy.trailer import read_trailer, with_trailer
from tersenet.errors import ExportError, FileError, TersenetError, require
from tersenet.graph.capture import export
from tersenet.task import Preparation

# Types of inputs as ExecuTorch's files number them (those of c10::ScalarType), and as numpy names them.
_DTYPES = {0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64",
           11: "bool"}  # fmt: skip


def open_executorch(path: Path, threads: int) -> Runner:
    """Opens a .pte file of tensors.

    The threads are the process's: whoever opens another file with another number changes them for this one too.

    Raises:
        FileError: when its forward takes no tensor.
    """
    require("executorch", "executorch", f"run {path.name}")
    with quiet_native():
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        # The only way to say it; "unsafe" while another call runs, and none does.
        portable_lib._unsafe_reset_threadpool(threads)
        # Kept by the closure below: a method does not keep its program alive.
        program = Runtime.get().load_program(path.read_bytes())
        method = program.load_method("forward")
    if method is None or not method.metadata.num_inputs():
        raise FileError(f"{path} does not have a forward of tensors; such files can be run here")

    def call(*arrays: Array, _program: Any = program) -> tuple[Array, ...]:
        outputs = method.execute([torch.from_numpy(x) for x in arrays])
        return tuple(np.array(as_array(output)) for output in outputs)  # copies

    inputs = []
    for index in range(method.metadata.num_inputs()):
        meta = method.metadata.input_tensor_meta(index)
        inputs.append(Input(f"input {index}", tuple(int(size) for size in meta.sizes()), _DTYPES.get(meta.dtype())))
    return Runner("executorch", path, inputs[0].shape, call, threads, read_trailer(path), tuple(inputs))


def export_executorch(
    model: nn.Module, example: Tensor, path: str | Path, preparation: Preparation | None = None
) -> Path:
    """Writes a model as a .pte file whose batch is that of the example; the model is left as it was.

    Args:
        model: any module of one input.
        example: (N, ...) float32; only its shape is used.
        path: ends in .pte. Written whole or not at all.
        preparation: of the inputs, kept in the file.
    Raises:
        TraceError: when the forward cannot be captured.
        ExportError: when the exporter fails.
        MissingExtra: when executorch is not installed.
    """
    require("executorch", "executorch", "write ExecuTorch files")
    model = unmask(copy.deepcopy(model))
    if rounds_activations(model):
        graph = decomposed(model, example, EXECUTORCH)
    else:
        graph = with_float_weights(model, example)
    program = export(graph, example, dynamic_batch=False)
    try:
        with quiet_native():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            content = lowered.to_executorch().buffer
    except TersenetError:
        raise
    except Exception as error:  # the exporter raises many kinds; each becomes one sentence
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ExportError(f"{type(model).__name__} could not be written for ExecuTorch: {reason}") from error
    with writing(Path(path)) as temporary:
        temporary.write_bytes(with_trailer(content, preparation))
    return Path(path)
