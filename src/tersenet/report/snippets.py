"""How a file is loaded and run, in five lines of Python per runtime: for the model card and the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tersenet.numerics.scale import ACCURACY, Scale
from tersenet.report.words import runtime_name

# Of its own accord OpenVINO computes in bfloat16 where the processor can, and rounds what some linear layers read.
_EXACT = '{{"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}}'
_OPENVINO = (
    "OpenVINO",
    "import numpy, openvino",
    f'openvino.compile_model({{name}}, "CPU", {_EXACT})',
    "model(images)[0]",
)
# suffix -> (runtime, its imports, how it is opened, how it is called).
SNIPPETS = {
    ".onnx": (
        (
            "ONNX Runtime",
            "import numpy, onnxruntime",
            "onnxruntime.InferenceSession({name})",
            "model.run(None, {{model.get_inputs()[0].name: images}})[0]",
        ),
        _OPENVINO,
    ),
    ".xml": (_OPENVINO,),
    ".pt2": (
        ("Plain PyTorch, without tersenet", "import torch", "torch.export.load({name}).module()", "model(images)"),
    ),
    ".terse": (("tersenet", "import torch, tersenet", "tersenet.load({name}).eval()", "model(images)"),),
}
# How all inputs are given by order, where that is not as in PyTorch.
_ON_ALL = {
    "ONNX Runtime": "model.run(None, {each.name: x for each, x in zip(model.get_inputs(), inputs)})",
    "OpenVINO": "model(inputs)",
}


def snippets(
    name: str, preparation: Mapping[str, Any], file: Mapping[str, Any], scale: Scale = ACCURACY
) -> list[tuple[str, str]]:
    """(runtime, lines) per runtime in which a file was checked; none for a format that is not known.

    Args:
        name: of the file, from where the lines are run.
        preparation, file: of the report.
        scale: of the report; only logits have a class to print.
    """
    found = []
    checked = [runtime_name(each) for each in file.get("checked", [file.get("runtime")]) if each]
    for head, imports, load, call in SNIPPETS.get(Path(name).suffix, ()):
        if Path(name).suffix == ".onnx" and head not in checked:
            continue
        lines = [imports, f"model = {load.format(name=json.dumps(name))}"]
        lines += _calls(head, call, preparation, "torch" in imports, scale)
        found.append((head, "\n".join(lines)))
    return found


def snippet(
    name: str, runtime: str | None, preparation: Mapping[str, Any], file: Mapping[str, Any], scale: Scale
) -> str | None:
    """The lines for one runtime; None where the file was not checked there."""
    wanted = runtime_name(runtime) if runtime else ""
    listed = snippets(name, preparation, file, scale)
    return next((code for head, code in listed if wanted in head), None)


def shape_of(preparation: Mapping[str, Any]) -> list[int] | None:
    """(C, H, W) of an image as it is fed; None where the report does not say it."""
    if not preparation.get("size") or not preparation.get("mean"):
        return None
    return [len(preparation["mean"]), *preparation["size"]]


def _calls(head: str, call: str, preparation: Mapping[str, Any], torch: bool, scale: Scale) -> list[str]:
    if inputs := preparation.get("inputs"):
        return [
            f"inputs = [{', '.join(_zeros(each, torch) for each in inputs)}]  # as prepared for the original",
            f"outputs = {_ON_ALL.get(head, 'model(*inputs)')}",
            "print(outputs)",
        ]
    shape: Sequence[int] = shape_of(preparation) or [3, 224, 224]
    sizes = ", ".join(map(str, shape))
    zeros = f"torch.zeros(1, {sizes})" if torch else f'numpy.zeros((1, {sizes}), "float32")'
    name, shown = ("logits", "logits.argmax(-1)") if scale.name == ACCURACY.name else ("outputs", "outputs")
    return [f"images = {zeros}  # a prepared image", f"{name} = {call.format()}", f"print({shown})"]


def _zeros(each: Mapping[str, Any], torch: bool) -> str:
    """One sample of an input, in code."""
    sizes = ", ".join(map(str, [1, *each["shape"]]))
    return (
        f"torch.zeros({sizes}, dtype=torch.{each['dtype']})" if torch else f'numpy.zeros(({sizes},), "{each["dtype"]}")'
    )
