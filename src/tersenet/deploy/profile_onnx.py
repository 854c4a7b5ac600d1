"""Times of the operators in ONNX Runtime, each brought back to the layer that it came from.

ONNX Runtime's profiler times the operators of the optimised graph, and knows nothing of layers. The way back:

1. Every operator of our file is renamed, with its outputs, to a number. The optimiser names what it fuses after one of
   the operators that went in, or after the value that comes out, so the number is in the new name.
2. An operator that reads a layer's tensor ("layer1.0.conv1.weight"), directly or through constants, is of that layer.
   The exporter transposes the weight of a linear layer on sequences and takes its name; that one is known by content.
3. Any other operator is found by where it stands: the layers with tensors that are next above it, and what it does. The
   traced graph has the same layers, so the node there that stands in the same place is the one.

What cannot be brought back so keeps the operator's name; nothing is dropped, and nothing is guessed between two. The
numbers and the rows (`Numbered`) serve other runtimes that read the same file too (`profile_openvino`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from tersenet.deploy.work import Key
from tersenet.errors import require

Times = dict[Key, list[float]]  # milliseconds of each operator
Place = frozenset[str]  # paths of the layers with tensors next above; "" is the input

_NUMBER = re.compile(r"operator(\d+)_")
_SMALL = 4096  # the exporter's own limit is 1024 numbers
_ROUNDING = ("QuantizeLinear", "DequantizeLinear")
_LAYOUT = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Cast", "Shape", "Gather", "Identity", "Expand"}
_LAYOUT |= {"ReorderInput", "ReorderOutput"}  # ONNX Runtime's own

# What a kind of node becomes in ONNX, as `_plain` spells the kind. Any other kind may become anything.
_BECOMES: dict[str, set[str]] = {
    "relu": {"Relu"},
    "relu6": {"Clip", "Min", "Max"},
    "hardtanh": {"Clip", "Min", "Max"},
    "clamp": {"Clip", "Min", "Max"},
    "add": {"Add", "Sum"},
    "mul": {"Mul"},
    "cat": {"Concat"},
    "matmul": {"MatMul"},
    "softmax": {"Softmax"},
    "maxpool2d": {"MaxPool"},
    "avgpool2d": {"AveragePool"},
    "adaptiveavgpool2d": {"GlobalAveragePool", "AveragePool", "ReduceMean"},
    "mean": {"GlobalAveragePool", "ReduceMean"},
    "quantizer": set(_ROUNDING),
}
# Layers whose every operator reads their tensors; nothing else is theirs.
_WHOLE = re.compile(r"conv|linear|embedding")


def told_apart(model: nn.Module) -> nn.Module:
    """A copy in which no two small parameters are equal, nor any two the same one.

    The exporter stores small equal tensors once (all fresh norms have ones), which would hide whose they are. What the
    values are does not matter for time.
    """
    model = copy.deepcopy(model)
    seen: set[bytes] = set()
    chance = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_floating_point() or parameter.numel() > _SMALL:
                continue
            value = parameter.detach().clone()
            while (mark := _digest(value.cpu().numpy())) in seen:
                value.copy_(torch.rand(value.shape, generator=chance))
            seen.add(mark)
            module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    return model


@dataclass(frozen=True)
class Numbered:
    """An ONNX file whose operators are numbered.

    Args:
        path: the file.
        graph: what is in it.
        rows: the row of each operator, None where it has none.
    """

    path: Path
    graph: Any
    rows: Sequence[Key | None]


def numbered(path: Path, folder: Path, rows: Callable[[Any], Sequence[Key | None]]) -> Numbered:
    """Writes a numbered twin of an ONNX file.

    Args:
        path: the file.
        folder: where the twin goes.
        rows: the graph of the twin -> the row of each operator.
    """
    onnx = require("onnx", "onnx", "read ONNX files")
    proto = onnx.load(path)
    _number(proto.graph)
    twin = folder / "numbered.onnx"
    onnx.save(proto, twin)
    return Numbered(twin, proto.graph, rows(proto.graph))


class OnnxProfiler:
    """A session of ONNX Runtime under its profiler; call it as often as wanted, then take the times once.

    Args:
        source: the file to profile.
        folder: where the profiler writes.
        threads: how many one call may use.
    """

    def __init__(self, source: Numbered, folder: Path, threads: int) -> None:
        self.onnx = require("onnx", "onnx", "read ONNX files")
        runtime = require("onnxruntime", "onnx", "profile ONNX files")
        self.source, self.optimised = source, folder / "optimised.onnx"
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4  # it warns that the optimised file is for this machine only, as it should be
        options.optimized_model_filepath = str(self.optimised)
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        self.session = runtime.InferenceSession(str(source.path), options, providers=["CPUExecutionProvider"])
        self.feeds = [each.name for each in self.session.get_inputs()]

    def __call__(self, x: tuple[np.ndarray, ...]) -> None:
        self.session.run(None, dict(zip(self.feeds, x, strict=True)))

    def times(self) -> Times:
        """Median milliseconds of each operator that ran, under the row that it belongs to."""
        samples: dict[str, list[int]] = defaultdict(list)
        kinds: dict[str, str] = {}
        for event in json.loads(Path(self.session.end_profiling()).read_text()):
            name = str(event["name"])
            if event["cat"] == "Node" and name.endswith("_kernel_time"):
                name = name.removesuffix("_kernel_time")
                samples[name].append(int(event["dur"]))
                kinds[name] = str(event["args"]["op_name"])
        origins = _origins(self.source.graph, self.onnx.load(self.optimised).graph.node)
        times: Times = defaultdict(list)
        for name, microseconds in samples.items():
            origin = origins.get(name)
            key = None if origin is None else self.source.rows[origin]
            times[key or ("", kinds[name])].append(float(np.median(microseconds)) / 1e3)
        return times


def _number(graph: Any) -> None:
    """Numbers the operators and all that they make, in place."""
    new: dict[str, str] = {}
    for index, node in enumerate(graph.node):
        node.name = f"operator{index}_"
        for place, name in enumerate(node.output):
            if name:
                new[name] = f"operator{index}_{place}"
    for node in graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    for value in graph.output:
        value.name = new.get(value.name, value.name)


def _origins(graph: Any, executed: Iterable[Any]) -> dict[str, int]:
    """Name of an executed operator -> number of the operator of our file whose work it mostly is.

    A convolution that swallowed the ReLU behind it is named after the ReLU; then it is the nearest one above.
    """
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output}
    numbers: dict[str, tuple[int, str]] = {}
    for node in executed:
        found = _NUMBER.search(node.name)
        if found is None and node.op_type not in _LAYOUT:  # a new layout of a value is nothing that made the value
            found = next((match for name in node.output if (match := _NUMBER.search(name))), None)
        if found:
            numbers[node.name] = int(found[1]), node.op_type
    return {name: _nearest(graph, makers, index, kind) for name, (index, kind) in numbers.items()}


def _nearest(graph: Any, makers: Mapping[str, int], index: int, kind: str) -> int:
    """The operator of this kind at a number or next above it; the number itself where there is none."""
    front, reached = deque([index]), {index}
    while front:
        at = front.popleft()
        if graph.node[at].op_type in kind:  # "Conv" in "QLinearConv"
            return at
        above = [makers[value] for value in graph.node[at].input if value in makers]
        front.extend(each for each in above if each not in reached)
        reached.update(above)
    return index


def owners(proto: Any, graph: fx.GraphModule, keys: Mapping[fx.Node, Key]) -> list[Key | None]:
    """The row of each operator of our file, None where it has none.

    Args:
        proto: the graph of a file of a model of `told_apart`.
        graph: the same model, by `tersenet.graph.trace.trace`.
        keys: the row of each node that has one.
    """
    to_array = require("onnx.numpy_helper", "onnx", "read ONNX files").to_array
    layers = {str(node.target): keys[node] for node in keys if node.op == "call_module"}
    # Values that do not depend on the input: name -> path of the layer whose tensors went in, if any.
    contents = {
        _digest(array): str(node.target)
        for node in keys
        if node.op == "call_module"
        for weight in graph.get_submodule(str(node.target)).parameters()
        if weight.dim() == 2
        for array in (weight.detach().cpu().numpy().T,)
    }
    constant = {
        tensor.name: _path(tensor.name, layers) or contents.get(_digest(to_array(tensor)))
        for tensor in proto.initializer
    }
    paths: list[str | None] = []
    for node in proto.node:
        path = next((constant[name] for name in node.input if constant.get(name)), None)
        paths.append(path)
        if all(not name or name in constant for name in node.input):
            constant.update(dict.fromkeys(node.output, path))
    marks = {path for node, path in zip(proto.node, paths, strict=True) if path and node.op_type not in _ROUNDING}
    places = _places(graph, keys, marks)
    above: dict[str, Place] = {value.name: frozenset({""}) for value in proto.input}
    rows: list[Key | None] = []
    for node, path in zip(proto.node, paths, strict=True):
        place = frozenset[str]().union(*(above.get(name, ()) for name in node.input))
        rows.append(layers[path] if path is not None else _standing(places.get(place, []), node.op_type))
        if node.op_type != "Shape" and not all(not name or name in constant for name in node.input):
            above.update(dict.fromkeys(node.output, frozenset({path}) if path is not None and path in marks else place))
    return rows


def _digest(array: np.ndarray) -> bytes:
    shape = repr((array.shape, array.dtype)).encode()
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes() + shape).digest()


def _path(tensor: str, layers: Mapping[str, Key]) -> str | None:
    """The layer that holds a tensor: the longest path that the tensor's name begins with."""
    while "." in tensor:
        tensor = tensor.rpartition(".")[0]
        if tensor in layers:
            return tensor
    return None


def _places(graph: fx.GraphModule, keys: Mapping[fx.Node, Key], marks: set[str]) -> dict[Place, list[Key]]:
    """The rows that stand in each place of the traced graph."""
    above: dict[fx.Node, Place] = {}
    found: dict[Place, list[Key]] = defaultdict(list)
    for node in graph.graph.nodes:
        place = frozenset({""} if node.op == "placeholder" else ())
        place = place.union(*(above[source] for source in node.all_input_nodes))
        if node in keys and keys[node] not in found[place]:
            found[place].append(keys[node])
        if "sym_size" in str(node.target):  # a size is no way from one layer to another
            place = frozenset()
        above[node] = frozenset({str(node.target)}) if node.op == "call_module" and node.target in marks else place
    return found


def _standing(rows: list[Key], operator: str) -> Key | None:
    """The one row in a place that an operator can come from."""
    exact = [key for key in rows if operator in _BECOMES.get(_plain(key[1]), ())]
    if not exact and operator not in _LAYOUT:
        exact = [key for key in rows if _plain(key[1]) not in _BECOMES and not _WHOLE.search(_plain(key[1]))]
    return exact[0] if len(exact) == 1 else None


def _plain(kind: str) -> str:
    """ "AdaptiveAvgPool2d" and "adaptive_avg_pool2d" -> "adaptiveavgpool2d"."""
    return kind.lower().replace("_", "")
