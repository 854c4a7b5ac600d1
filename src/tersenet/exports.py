"""A model in memory as a file for a runtime, checked there: `tersenet.export`, and what the command `export` does."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersenet.bricks.opened import copied, make_permanent, need_float32, unwrapped
from tersenet.bricks.settle import settle
from tersenet.deploy.artifact import save_terse
from tersenet.deploy.checked import CHECKED, checked, held
from tersenet.deploy.decomposed import rounds_activations
from tersenet.deploy.folded import with_half_weights
from tersenet.deploy.left_in_float import left_in_float
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.openvino import export_openvino
from tersenet.deploy.pt2 import export_pt2
from tersenet.deploy.reference import Reference
from tersenet.deploy.tensorrt import broken_rules, export_tensorrt, symmetric
from tersenet.errors import InputWarning, SettingsError
from tersenet.ship import left_note
from tersenet.task import Preparation

# What can be written: the ending, and the runtime that checks it.
WRITTEN = {
    "onnx": (".onnx", "onnxruntime"),
    "openvino": (".xml", "openvino"),
    "tensorrt": (".tensorrt.onnx", "onnxruntime"),
    "torch": (".pt2", "pytorch"),
    "terse": (".terse", "pytorch"),
    "litert": (".tflite", "litert"),
    "litert-fp16": (".fp16.tflite", "litert"),
    "executorch": (".pte", "executorch"),
}


def export(
    model: nn.Module,
    example: Any,
    path: str | Path,
    *,
    runtimes: Sequence[str] = (),
    preparation: Preparation | None = None,
) -> dict[str, Any]:
    """Writes a model as a file of the kind that its name ends in, and holds it to the model there, as the commands do.

    Args:
        model: any module, compressed or not; it is left as it was. It is written in evaluation mode, with masks and
            rounding made permanent.
        example: one input (N, ...), or a tuple of all inputs by order; real ones, since the file is compared on them.
        path: .onnx, .xml (OpenVINO), .pt2 (PyTorch), .terse, .tflite, .fp16.tflite, .pte, or .tensorrt.onnx.
        runtimes: of an .onnx file, in which it must be right: "onnxruntime" (the default), "openvino", or both.
        preparation: how an image becomes an input, for the file to say; without it the file says the size alone.
    Returns:
        {"bytes", "max_abs_error"}; of a model with rounded activations also "left_in_float", the operators that the
        (first) runtime does not run in integers.
    Raises:
        SettingsError: on another ending, or runtimes that do not read such a file.
        TraceError: when the forward cannot be captured.
        ExportError: when the file cannot be written or is not right, which removes it.
    """
    path, inputs = Path(path), example if isinstance(example, tuple) else (example,)
    endings = {suffix: name for name, (suffix, _) in WRITTEN.items()}
    target = next((endings[end] for end in sorted(endings, key=len, reverse=True) if path.name.endswith(end)), None)
    if target is None:
        raise SettingsError(f"the file to write is {path}; its name must end in one of {', '.join(endings)}")
    if unread := [name for name in runtimes if path.suffix != ".onnx" or name not in ("onnxruntime", "openvino")]:
        raise SettingsError(
            f"runtimes is {', '.join(unread)}; an .onnx file takes onnxruntime and openvino, others none"
        )
    need_float32(model, example)
    # One sample must not look like a fixed size.
    inputs = tuple((x if len(x) > 1 else torch.cat([x, x])).detach().cpu() for x in inputs)
    own = copied(unwrapped(model))
    make_permanent(own)
    own = settle(own).cpu()
    for module in own.modules():
        module.training = False  # set directly: the graph of an exported program refuses eval()
    given = inputs if len(inputs) > 1 else inputs[0]
    said = Preparation.of_inputs(inputs) if preparation is None else preparation
    result = write_checked(own, given, said, path, target, tuple(runtimes))
    if target != "tensorrt" and (left := result.get("left_in_float")):
        warnings.warn(left_note(runtimes[0] if runtimes else WRITTEN[target][1], left), InputWarning, stacklevel=2)
    return result


def write_checked(
    model: nn.Module,
    example: Any,
    preparation: Preparation | None,
    path: Path,
    target: str,
    runtimes: Sequence[str] = (),
    kept: bool = False,
) -> dict[str, Any]:
    """Writes one file and holds it to its model, as `export_to` says.

    Args:
        runtimes: in place of the one that the target is for.
        kept: whether the file is there already, and only held to the model.
    """
    suffix, usual = WRITTEN[target]
    runtimes = runtimes or (usual,)
    write = functools.partial(_write, model, example, preparation, path, target, runtimes=runtimes)
    if not kept:
        write()
    meant = symmetric(model, example) if target == "tensorrt" else model
    reference = Reference(meant, example, [(example, None)])
    if target == "tensorrt":  # its quantizers have other grids, and rounding errs alike on them
        reference.tolerances = Reference(model, example, [(example, None)]).tolerances
    if target == "litert-fp16":
        reference.allow(with_half_weights(model, example))
    if kept:
        agreements = held(path, runtimes, reference)
    else:
        again = (lambda floats: write(floats=floats)) if target in ("onnx", "openvino") else None
        agreements = checked(path, runtimes, reference, again)
    weights = path.with_suffix(".bin")
    size = path.stat().st_size + (weights.stat().st_size if suffix == ".xml" else 0)
    found: dict[str, Any] = {"bytes": size, **max(agreements.values(), key=lambda each: each.max_abs_error).to_json()}
    if rounds_activations(model) and target not in ("torch", "terse", "litert-fp16"):
        left = broken_rules(path) if target == "tensorrt" else left_in_float(path, runtimes[0])
        found["left_in_float"] = left
    return found


def _write(
    model: nn.Module,
    example: Any,
    preparation: Preparation | None,
    path: Path,
    target: str,
    floats: Sequence[str] = (),
    runtimes: Sequence[str] = ("onnxruntime",),
) -> None:
    """Writes one file; `floats` as in `export_onnx`, and `runtimes` those in which an ONNX file will be held to it."""
    if target == "tensorrt":
        export_tensorrt(model, example, path, preparation)
    elif path.suffix == ".pt2":
        export_pt2(model, example, path, None if preparation is None else preparation.metadata())
    elif path.suffix == ".terse":
        save_terse(model, example, path, preparation)
    elif path.suffix == ".onnx":
        export_onnx(model, example, path, preparation, {CHECKED: ",".join(runtimes)}, floats=floats)
    elif path.suffix == ".tflite":
        from tersenet.deploy.litert import export_litert

        export_litert(model, example[:1], path, preparation, half=target == "litert-fp16")
    elif path.suffix == ".pte":
        from tersenet.deploy.executorch import export_executorch

        export_executorch(model, example[:1], path, preparation)
    else:
        export_openvino(model, example, path, preparation, floats)
