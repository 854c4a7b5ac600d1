"""What a runtime leaves in float although the model around it is quantized, read from what the runtime itself made.

An int8 file is as fast as its graph is fused: a convolution that stays in float between two integer ones costs its own
time and two conversions. Nothing here is judged from the file that we wrote; each runtime optimises it and is asked for
the result. An operator counts when a value that was rounded reaches it and what it computes is rounded again; what lies
before the first rounding or after the last one does not.

TensorRT's files are judged by `tersenet.deploy.tensorrt.broken_rules`, since TensorRT is not at hand.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from tersenet.deploy.quiet import quiet_native
from tersenet.errors import SettingsError, require


@dataclass(frozen=True)
class Operator:
    """An operator of a runtime's own graph.

    Args:
        kind: as the runtime calls it.
        name: of the operator, or of what it computes.
        reads: the values that it reads, without constants.
        makes: the values that it computes.
        integer: whether it computes in integers, or rounds to them.
        moves: whether it computes nothing: a conversion, a layout, a shape.
    """

    kind: str
    name: str
    reads: Sequence[str]
    makes: Sequence[str]
    integer: bool
    moves: bool = False


def left_in_float(path: str | Path, runtime: str) -> list[str]:
    """The float operators that a runtime leaves between integer ones, as "kind name"; empty when all is fused.

    Args:
        path: a file that the runtime reads.
        runtime: a name of `READERS`.
    Raises:
        SettingsError: on a runtime that does not tell what it made of a file.
        MissingExtra: when the runtime is not installed.
    """
    if runtime not in READERS:
        raise SettingsError(
            f"what {runtime} leaves in float cannot be read; it can for {', '.join(READERS)}: name one of them"
        )
    return between(READERS[runtime](Path(path)))


def integer_operators(path: str | Path, runtime: str) -> int:
    """How many operators of a file run in integers; 0 in a file that is not quantized. As `left_in_float`."""
    return sum(operator.integer and not operator.moves for operator in READERS[runtime](Path(path)))


def between(operators: Iterable[Operator]) -> list[str]:
    """Those in float that have an integer operator somewhere above and somewhere below, in the order given.

    Args:
        operators: of one graph, each after those that it reads.
    """
    listed = list(operators)
    above: set[str] = set()
    for each in listed:
        if each.integer or any(value in above for value in each.reads):
            above.update(each.makes)
    below: set[str] = set()  # values that an integer operator is made of
    for each in reversed(listed):
        if each.integer or any(value in below for value in each.makes):
            below.update(each.reads)
    return [
        f"{each.kind} {each.name}"
        for each in listed
        if not each.integer
        and not each.moves
        and any(value in above for value in each.reads)
        and any(value in below for value in each.makes)
    ]


def _onnxruntime(path: Path) -> list[Operator]:
    """The graph that ONNX Runtime's optimiser writes."""
    onnx = require("onnx", "onnx", "read ONNX files")
    runtime = require("onnxruntime", "onnx", "optimise ONNX files")
    with tempfile.TemporaryDirectory() as folder:
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        # Extended, because the level above writes layouts that are for this machine only; int8 fusion is done by then.
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    constants = {tensor.name for tensor in graph.initializer}
    whole: set[str] = set()  # values that are integers, so that what moves or chooses them runs on integers
    found = []
    for node in graph.node:
        rounds = node.op_type.startswith(("QLinear", "QGemm", "QAttention", "QuantizeLinear", "DynamicQuantize"))
        rounds = rounds or node.op_type.endswith("Integer")
        passes = bool(node.input) and node.input[0] in whole and node.op_type != "DequantizeLinear"
        if rounds or passes or (node.op_type == "DequantizeLinear" and node.input[0] not in constants):
            integer = True
            whole.update(() if node.op_type == "DequantizeLinear" else node.output)
        else:
            integer = False
        reads = [name for name in node.input if name and name not in constants]
        name = node.name or node.output[0]
        moves = node.op_type in ("QuantizeLinear", "DequantizeLinear", "Shape", "Reshape", "Cast")
        found.append(Operator(node.op_type, name, reads, list(node.output), integer, moves))
    return found


def _openvino(path: Path) -> list[Operator]:
    """The graph that OpenVINO's CPU plugin runs, with the precision that each operator got."""
    openvino = require("openvino", "openvino", "optimise files for OpenVINO")
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = core.compile_model(core.read_model(str(path)), "CPU", settings).get_runtime_model()
    found = []
    for node in model.get_ordered_ops():
        said = {key: str(getattr(value, "value", value)) for key, value in node.get_rt_info().items()}
        kind, precision = said.get("layerType", node.get_type_name()), said.get("runtimePrecision", "")
        if kind == "Const":
            continue
        reads = [f"{source.get_node().get_friendly_name()}:{source.get_index()}" for source in node.input_values()]
        name = node.get_friendly_name()
        makes = [f"{name}:{index}" for index in range(len(node.outputs()))]
        integer = precision in ("u8", "i8", "U8", "I8") or kind == "FakeQuantize"
        moves = kind in ("Reorder", "Input", "Output", "Convert", "Reshape", "FakeQuantize", "Result", "Parameter")
        found.append(Operator(kind, name, reads, makes, integer, moves))
    return found


def _litert(path: Path) -> list[Operator]:
    """The operators of a .tflite file with the types of what they compute; XNNPACK has kernels for the same types."""
    require("ai_edge_litert", "litert", f"read {path.name}")
    with quiet_native():
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES  # which would hide the operators that they take
        interpreter = Interpreter(model_path=str(path), experimental_op_resolver_type=plain)
        interpreter.allocate_tensors()
    integers = {
        detail["index"]
        for detail in interpreter.get_tensor_details()
        if detail["dtype"] in (np.int8, np.uint8, np.int16)
    }
    found: list[Operator] = []
    made = {int(detail["index"]) for detail in interpreter.get_input_details()}
    for number, each in enumerate(interpreter._get_ops_details()):
        kind, reads = each["op_name"], [int(index) for index in each["inputs"] if index in made]
        makes = [int(index) for index in each["outputs"]]
        integer = bool(integers.intersection(makes)) or (kind == "DEQUANTIZE" and bool(integers.intersection(reads)))
        moves = kind in ("QUANTIZE", "DEQUANTIZE", "RESHAPE", "TRANSPOSE")
        if reads:  # else it works on constants
            made.update(makes)
            found.append(Operator(kind, str(number), list(map(str, reads)), list(map(str, makes)), integer, moves))
    return found


def _executorch(path: Path) -> list[Operator]:
    """The operators that XNNPACK was given with the types of what they compute, and the kernels beside it."""
    require("executorch", "executorch", f"read {path.name}")
    with quiet_native():
        from executorch.exir._serialize._program import _extract_delegate_payload, deserialize_pte_binary

        content = path.read_bytes()
        plan = deserialize_pte_binary(content).program.execution_plan[0]
    found = []
    for number, instruction in enumerate(each for chain in plan.chains for each in chain.instructions):
        call = instruction.instr_args
        if hasattr(call, "delegate_index"):
            backend = plan.delegates[call.delegate_index].id
            payload = _extract_delegate_payload(content, backend, call.delegate_index)
            found += _xnnpack(payload, number, [f"value {index}" for index in call.args])
        elif hasattr(call, "op_index"):  # an out variant: the last value is what it computes
            values = [f"value {index}" for index in call.args]
            reads = [name for name in values if name != values[-1]]
            found.append(Operator(plan.operators[call.op_index].name, str(number), reads, values[-1:], integer=False))
    return found


def _xnnpack(payload: bytes, number: int, outside: Sequence[str]) -> list[Operator]:
    """The operators of one of XNNPACK's graphs, which lies in the file as a FlatBuffer of its own.

    Args:
        number: of the call, so that names of different graphs differ.
        outside: names of the values that come from and go to the rest of the program.
    """
    graph = _xnnpack_json(payload)
    names, types = {}, {}
    for value in graph["xvalues"]:
        union = value["xvalue_union"]
        tensor = union.get("tensor_value", union)
        external = tensor["external_id"]
        inside = f"{number}.{tensor['id_out']}"
        names[tensor["id_out"]] = outside[external] if external < len(outside) and tensor["flags"] else inside
        types[tensor["id_out"]] = tensor["datatype"]
    found = []
    for place, node in enumerate(graph["xnodes"]):
        fields, kind = node["xnode_union"], node["xnode_union_type"].removeprefix("XNN")
        reads = [value for key, value in fields.items() if re.fullmatch(r"input\d?_id", key) and value in names]
        make = fields["output_id"]
        integer = "int8" in types[make] or (kind == "Convert" and "int8" in types[reads[0]])
        moves = kind in ("Convert", "StaticTranspose", "StaticReshape", "Copy")
        found.append(Operator(kind, f"{number}.{place}", [names[i] for i in reads], [names[make]], integer, moves))
    return found


def _xnnpack_json(payload: bytes) -> dict[str, Any]:
    import executorch.backends.xnnpack.serialization as schemas
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory() as folder:
        schema, program = Path(folder) / "schema.fbs", Path(folder) / "program.bin"
        schema.write_bytes(resources.files(schemas).joinpath("schema.fbs").read_bytes())
        program.write_bytes(payload[header.flatbuffer_offset :][: header.flatbuffer_size])
        _flatc_decompile(folder, str(schema), str(program))
        text = program.with_suffix(".json").read_text()
    return json.loads(re.sub(r"\b(inf|nan)\b", "Infinity", text))  # which JSON has no words for


READERS: dict[str, Callable[[Path], list[Operator]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "litert": _litert,
    "executorch": _executorch,
}
