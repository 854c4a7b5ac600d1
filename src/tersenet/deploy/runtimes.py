"""Opens a file in the runtime that ships it: ONNX Runtime, OpenVINO, PyTorch, LiteRT or ExecuTorch, all behind one
`Runner`.

Every runtime is set to the same thing, said explicitly rather than left to its defaults: float32 stays float32, a
fixed number of threads, one request at a time, all graph optimisations. OpenVINO's own default on CPUs with bfloat16
is a lower precision, which would compare a float file with something else.

To add a runtime: an opener here and one line in `RUNTIMES`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tersenet.deploy.runner import Array, Input, Runner, as_array
from tersenet.errors import FileError, SettingsError, TersenetError, require


def open_file(path: str | Path, runtime: str | None = None, threads: int = 1) -> Runner:
    """Opens a file in a runtime.

    Args:
        path: .onnx, .xml (OpenVINO), .pt2, .terse, .tflite (LiteRT) or .pte (ExecuTorch).
        runtime: a name of `RUNTIMES`; None takes the first that reads this kind of file.
        threads: how many threads one call may use.
    Raises:
        SettingsError: on an unknown runtime, or one that cannot read this kind of file.
        FileError: when the file is missing or damaged.
        MissingExtra: when the runtime is not installed; names the extra.
    """
    path = Path(path)
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise SettingsError(f"threads must be a whole number of at least 1, got {threads!r}")
    name = runtime_for(path) if runtime is None else runtime
    if name not in RUNTIMES:
        raise SettingsError(f"there is no runtime {name!r}; the known ones are {', '.join(RUNTIMES)}")
    entry = RUNTIMES[name]
    if path.suffix.lower() not in entry.suffixes:
        raise SettingsError(f"{name} cannot read {path.name}; it reads {', '.join(entry.suffixes)}")
    if not path.is_file():
        raise FileError(f"there is no file {path}; check the path")
    if entry.extra is not None:
        require(entry.package, entry.extra, f"run {path.name}")
    try:
        return entry.opener(path, threads)
    except TersenetError:
        raise
    except Exception as error:  # each runtime has its own kinds; all mean that it refused the file
        raise FileError(f"{name} cannot open {path}: {_first_line(error)}; export the file again") from error


def open_module(
    model: Any, threads: int = 1, input_shape: tuple[int | None, ...] | None = None, inputs: tuple[Input, ...] = ()
) -> Runner:
    """A PyTorch module in memory as a runner: in evaluation mode while it is called, its modes put back after.

    Args:
        model: an nn.Module.
        threads: how many threads one call may use; PyTorch's own setting is put back after each call.
        input_shape: of its first input, (N, ...) with None for open sizes; None where it is not known.
        inputs: all inputs by order, where they are known.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def call(*arrays: Array) -> tuple[Array, ...]:
        with torch_threads(threads), _evaluating(model), torch.inference_mode():
            outputs = model(*(torch.from_numpy(x).to(device) for x in arrays))
            return tuple(as_array(leaf) for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor))

    return Runner("pytorch", None, input_shape, call, threads, {}, inputs)


def runtime_for(path: str | Path) -> str:
    """The first runtime of `RUNTIMES` that reads this kind of file.

    Raises:
        SettingsError: when none does.
    """
    suffix = Path(path).suffix.lower()
    for name, entry in RUNTIMES.items():
        if suffix in entry.suffixes:
            return name
    kinds = "; ".join(f"{name} reads {', '.join(entry.suffixes)}" for name, entry in RUNTIMES.items())
    raise SettingsError(f"no runtime reads {Path(path).name} ({kinds})")


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """PyTorch with this many threads inside the block. The setting is the process's, so it is put back."""
    import torch

    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _open_onnxruntime(path: Path, threads: int) -> Runner:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # what goes wrong is raised; its log would only repeat it on standard error
    # Workers of a finished call must not spin into the turn of the next contender.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = tuple(
        Input(
            node.name,
            tuple(size if isinstance(size, int) else None for size in node.shape),
            _ONNX_TYPES.get(node.type),
        )
        for node in session.get_inputs()
    )
    names = [each.name for each in inputs]
    fetch = [node.name for node in session.get_outputs()]

    def call(*arrays: Array) -> tuple[Array, ...]:
        return tuple(session.run(fetch, dict(zip(names, arrays, strict=True))))

    metadata = dict(session.get_modelmeta().custom_metadata_map)
    return Runner("onnxruntime", path, inputs[0].shape, call, threads, metadata, inputs)


def _open_openvino(path: Path, threads: int) -> Runner:
    import openvino as ov

    if path.suffix.lower() == ".xml" and not path.with_suffix(".bin").is_file():
        raise FileError(f"the weights of {path} are missing: there is no {path.with_suffix('.bin').name} beside it")
    core = ov.Core()
    model = core.read_model(str(path))
    inputs = tuple(
        Input(
            node.get_any_name(),
            tuple(size.get_length() if size.is_static else None for size in node.get_partial_shape()),
            np.dtype(node.get_element_type().to_dtype()).name,
        )
        for node in model.inputs
    )
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        # Else it rounds what linear layers with integer weights read, by itself and without being told.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # true was 4 times slower on a busy machine
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    # The ONNX reader keeps the file's own metadata under this heading, and OpenVINO's files carry it on.
    said = model.get_rt_info(["framework"]).value if model.has_rt_info(["framework"]) else {}
    metadata = {key: str(getattr(value, "value", value)) for key, value in said.items()}

    count = len(model.outputs)

    def call(*arrays: Array) -> tuple[Array, ...]:
        # share_inputs saves a copy of the input; the outputs are copied out, as ONNX Runtime does too.
        outputs = request.infer(list(arrays), share_inputs=True)
        return tuple(outputs[index] for index in range(count))

    return Runner("openvino", path, inputs[0].shape, call, threads, metadata, inputs)


def _open_pytorch(path: Path, threads: int) -> Runner:
    model, inputs, metadata = _read_module(path)
    return replace(open_module(model, threads, inputs[0].shape, inputs), path=path, metadata=metadata)


def _open_compiled(path: Path, threads: int) -> Runner:
    from tersenet.deploy.compiled import compiled

    model, inputs, metadata = _read_module(path)
    runner = open_module(compiled(path, model), threads, inputs[0].shape, inputs)
    return replace(runner, runtime="pytorch-compiled", path=path, metadata=metadata)


def _read_module(path: Path) -> tuple[Any, tuple[Input, ...], dict[str, str]]:
    """The module of a .pt2 or .terse file, its inputs and what it says about itself."""
    if path.suffix.lower() == ".terse":
        from tersenet.deploy.artifact import load_terse
        from tersenet.graph.outputs import OUTPUTS, describe, output_of

        model = load_terse(path)
        structure = describe(output_of(model).args[0])[1]
        said = _terse_metadata(path) | ({} if structure == 0 else {OUTPUTS: json.dumps(structure)})
        return model, model.inputs, said  # type: ignore[return-value]
    from tersenet.deploy.pt2 import read_pt2

    program, _, metadata = read_pt2(path)
    return program, program.inputs, metadata  # type: ignore[return-value]


def _open_litert(path: Path, threads: int) -> Runner:
    from tersenet.deploy.litert import open_litert

    return open_litert(path, threads)


def _open_executorch(path: Path, threads: int) -> Runner:
    from tersenet.deploy.executorch import open_executorch

    return open_executorch(path, threads)


def _terse_metadata(path: Path) -> dict[str, str]:
    """The preparation of a .terse file under the names of our ONNX files; nothing where its input is no image."""
    from tersenet.deploy.artifact import terse_preparation

    try:
        preparation = terse_preparation(path)
    except FileError:
        return {}
    return preparation.metadata()


class Runtime(NamedTuple):
    """How a runtime opens files: the opener, the suffixes it reads, its package, and the extra that installs it
    (None: part of the core)."""

    opener: Callable[[Path, int], Runner]
    suffixes: tuple[str, ...]
    package: str
    extra: str | None


# How ONNX Runtime names the types of inputs, and numpy.
_ONNX_TYPES = {
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16", "tensor(bool)": "bool",
    **{f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}  # fmt: skip

# The first that reads a suffix is its default.
RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": Runtime(_open_onnxruntime, (".onnx",), "onnxruntime", "onnx"),
    "openvino": Runtime(_open_openvino, (".onnx", ".xml"), "openvino", "openvino"),
    "pytorch": Runtime(_open_pytorch, (".pt2", ".terse"), "torch", None),
    "pytorch-compiled": Runtime(_open_compiled, (".pt2", ".terse"), "torch", None),
    "litert": Runtime(_open_litert, (".tflite",), "ai_edge_litert", "litert"),
    "executorch": Runtime(_open_executorch, (".pte",), "executorch", "executorch"),
}


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode inside the block. Flags are set directly: an exported module refuses `eval()`."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # OpenVINO says first where in its own code it stood.
    lines = [line for line in lines if not line.startswith("Exception from ")] or lines
    return lines[0].rstrip(".")[:300] if lines else type(error).__name__
