"""Models as .terse files: plain data that loads without the model's class, runs, trains on and exports.

The container and the coding are in `tersenet.codec`, the graph's form in `tersenet.deploy.graph_json`; this puts a
model's graph, input and output, preparation, plan and provenance into the manifest, and its state dict beside it.
"""

from __future__ import annotations

import dataclasses
import math
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tersenet.bricks.evaluating import evaluating
from tersenet.bricks.opened import copied, make_permanent
from tersenet.bricks.settle import settle
from tersenet.codec import container
from tersenet.deploy import graph_json
from tersenet.deploy.lazy import keep_coded
from tersenet.deploy.made_inputs import made_example
from tersenet.deploy.runner import Input
from tersenet.errors import ExportError, FileError, SettingsError, TraceError
from tersenet.graph.capture import Example
from tersenet.graph.outputs import describe, output_of, return_flat, return_nested
from tersenet.graph.trace import fixed_batch, trace
from tersenet.task import INTERPOLATIONS, Preparation

_KIND = "model"
_MAX_RANK = 16


def save_terse(
    model: nn.Module,
    example: Example,
    path: str | Path,
    preparation: Preparation | None = None,
    provenance: dict[str, Any] | None = None,
    plan: dict[str, Any] | None = None,
) -> Path:
    """Writes a model, settled (on a copy), as one file; whole or not at all.

    Args:
        model: any module that `trace` can capture.
        example: (N, ...), or all inputs; their values are used once, to see that what the file holds computes the same.
        provenance: where the model came from; JSON. The versions of tersenet and torch are added.
        plan: the plan of the steps that made it; JSON.
    Raises:
        TraceError: when the forward cannot be captured.
        ExportError: when the model holds a layer or operator that a file cannot, or the file would compute otherwise.
    """
    own = copied(model)
    make_permanent(own)
    settled = settle(own).cpu()
    inputs = tuple(x.detach().cpu() for x in (example if isinstance(example, tuple) else (example,)))
    graph = trace(settled, inputs)
    if (fixed := fixed_batch(graph)) is not None:
        raise TraceError(fixed)
    shapes = [_open_shape(node) for node in describe(output_of(graph).args[0])[0]]
    structure = return_flat(graph)
    names = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
    signature = [
        {"name": name, "shape": [None, *x.shape[1:]], "dtype": str(x.dtype).removeprefix("torch.")}
        for name, x in zip(names, inputs, strict=True)
    ]
    tensors = {name: _without_signed_zeros(value.detach()) for name, value in graph.state_dict().items()}
    manifest: dict[str, Any] = {
        "kind": _KIND,
        "graph": graph_json.to_json(graph),
        "input": {key: signature[0][key] for key in ("shape", "dtype")},
        **({"inputs": signature} if len(signature) > 1 else {}),
        "outputs": shapes,
        **({} if structure == 0 else {"structure": structure}),
        "preparation": None if preparation is None else preparation.to_json(),
        "plan": plan if plan is not None else {},
        "provenance": {"tersenet": metadata.version("tersenet"), "torch": torch.__version__, **(provenance or {})},
    }
    _check_rebuilt(settled, manifest, tensors, inputs)
    container.write(path, manifest, tensors)
    return Path(path)


def load_terse(path: str | Path, max_bytes: int | None = None, lazy: bool = False, threads: int = 1) -> fx.GraphModule:
    """The model of a file, in evaluation mode on the CPU: a plain torch.fx.GraphModule with the original's paths.

    It has `input_shape`, the shape (None, ...) of its first input with the batch open, and `inputs`, all of them.

    Args:
        max_bytes: the most that its tensors may take; by default 4 MiB and 1024 times the file.
        lazy: keep each layer's weights coded until something touches the layer. The file as a whole is checked at once,
            each tensor when it is decoded.
        threads: how many tensors are decoded at a time, where not `lazy`; the bits are the same with any.
    Raises:
        FileError: when the file is damaged, hostile, or holds no model; says where.
    """
    if lazy:
        stored = container.read_coded(path, max_bytes)
        manifest = stored.contents.manifest
        tensors = {name: stored.empty(name) for name in stored.contents.names}
    else:
        manifest, tensors = container.read(path, max_bytes, threads)
    try:
        inputs = _inputs(manifest)
        model = _rebuilt(manifest, tensors)
    except (ValueError, RuntimeError, RecursionError) as error:
        raise _bad(path, str(error) or "it is nested too deeply") from error
    if lazy:
        keep_coded(model, stored.tensor)
    model.input_shape = inputs[0].shape  # type: ignore[assignment]
    model.inputs = inputs  # type: ignore[assignment]
    return model


def terse_preparation(path: str | Path) -> Preparation:
    """How an image becomes an input of the file's model; where the file does not say, sizes come from its input.

    Raises:
        FileError: when the file is damaged or holds no model.
    """
    manifest = container.inspect(path).manifest
    try:
        found = manifest.get("preparation")
        if found is None:
            shape = _input_shape(manifest)
            if len(shape) != 4:
                raise ValueError("it does not say how its input is prepared, and its input is no image")
            _, channels, height, width = shape
            unknown = Preparation.unknown((height, width), channels)  # type: ignore[arg-type]
            return dataclasses.replace(unknown, assumed=("mean", "std"))
        return _preparation(found)
    except ValueError as error:
        raise _bad(path, str(error)) from error


def unpack(path: str | Path, out: str | Path) -> Path:
    """Writes a .terse file as one that needs no tersenet: a program (.pt2, .onnx) or its tensors alone (.safetensors).

    Raises:
        FileError: when the file cannot be read.
        SettingsError: for another ending.
        ExportError: when what was written does not agree with the model.
    """
    out = Path(out)
    if out.suffix == ".safetensors":
        from safetensors.torch import save_file

        from tersenet.atomic import writing

        # Tied tensors are written out: safetensors refuses names that share memory.
        _, tensors = container.read(path)
        with writing(out) as temporary:
            save_file(tensors, temporary)
        return out
    if out.suffix not in (".pt2", ".onnx"):
        raise SettingsError(
            f"a .terse file unpacks to .pt2, .onnx or .safetensors, got {out.name!r}; choose one of these endings"
        )
    model = load_terse(path)
    manifest = container.inspect(path).manifest
    example = made_example(model, str(path))
    preparation = terse_preparation(path) if manifest.get("preparation") is not None else None
    if out.suffix == ".onnx":
        from tersenet.deploy.onnx import export_onnx

        export_onnx(model, example, out, preparation)
    else:
        from tersenet.deploy.pt2 import export_pt2

        export_pt2(model, example, out, None if preparation is None else preparation.metadata())
    _compared(model, example, out)
    return out


def _compared(model: nn.Module, example: Example, path: Path) -> None:
    """Holds an unpacked file to the model, on made inputs."""
    from tersenet.deploy.checked import checked
    from tersenet.deploy.reference import Reference

    runtime = "onnxruntime" if path.suffix == ".onnx" else "pytorch"
    checked(path, [runtime], Reference(model, example, [(example, None)]))


def _without_signed_zeros(value: Tensor) -> Tensor:
    """-0.0 as 0.0, its equal: masks and rounding leave both, and only one of them is on a grid."""
    return value + 0.0 if value.is_floating_point() else value


def _open_shape(node: fx.Node) -> list[int | None] | None:
    return [None, *node.meta["shape"][1:]] if "shape" in node.meta else None


def _rebuilt(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> fx.GraphModule:
    """The model of a manifest. Raises ValueError where it is malformed."""
    graph = graph_json.from_json(manifest.get("graph"), tensors)
    if "structure" in manifest:
        return_nested(graph, manifest["structure"])
    return graph


def _check_rebuilt(
    model: nn.Module, manifest: dict[str, Any], tensors: dict[str, Tensor], inputs: tuple[Tensor, ...]
) -> None:
    """What the file will hold must compute what the model computes."""
    try:
        rebuilt = _rebuilt(manifest, {name: value.clone() for name, value in tensors.items()})
    except ValueError as error:
        raise ExportError(f"{type(model).__name__} cannot be written as a .terse file: {error}") from error
    with evaluating(model), torch.no_grad():
        pairs = zip(pytree.tree_leaves(model(*inputs)), pytree.tree_leaves(rebuilt(*inputs)), strict=True)
    for expected, found in pairs:
        if not isinstance(expected, Tensor):
            continue  # a constant of the graph
        wide = torch.promote_types(expected.dtype, torch.float32)  # booleans and integers too
        expected, found = expected.to(wide), found.to(wide)
        if not torch.allclose(
            expected, found, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())), equal_nan=True
        ):
            largest = float((expected - found).abs().max())
            raise ExportError(
                f"{type(model).__name__} written as a .terse file would differ by {largest:.3g} at an output; its "
                "forward may depend on chance or on state outside of its buffers"
            )


def _input_shape(manifest: dict[str, Any]) -> tuple[int | None, ...]:
    if manifest.get("kind") != _KIND:
        raise ValueError("it holds no model")
    signature = manifest.get("input")
    if not isinstance(signature, dict) or signature.get("dtype") not in list(graph_json.DTYPES):
        raise ValueError("it does not say what its input is")
    shape = signature.get("shape")
    if not isinstance(shape, list) or not 0 < len(shape) <= _MAX_RANK or shape[0] is not None:
        raise ValueError("the shape of its input is malformed")
    if not all(type(size) is int and 0 < size < 2**31 for size in shape[1:]):
        raise ValueError("the shape of its input is malformed")
    return tuple(shape)


def _inputs(manifest: dict[str, Any]) -> tuple[Input, ...]:
    """All inputs by order. Raises ValueError where they are malformed."""
    first = _input_shape(manifest)
    listed = manifest.get("inputs", [{"name": "input", **manifest["input"]}])
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise ValueError("its inputs are malformed")
    found = []
    for each in listed:
        shape = _input_shape({**manifest, "input": each})
        if not isinstance(each.get("name"), str):
            raise ValueError("an input has no name")
        found.append(Input(each["name"], shape, each["dtype"]))
    if not found or found[0].shape != first:
        raise ValueError("its inputs do not agree")
    return tuple(found)


def _preparation(found: Any) -> Preparation:
    optional = {"interpolation", "crop", "assumed"}
    if not isinstance(found, dict) or set(found) - optional != {"size", "mean", "std", "labels"}:
        raise ValueError("its preparation is malformed")
    size, mean, std, labels = (found[name] for name in ("size", "mean", "std", "labels"))
    if not all(isinstance(part, list) for part in (size, mean, std, labels)):
        raise ValueError("its preparation is malformed")
    whole = len(size) == 2 and all(type(side) is int and 0 < side < 2**20 for side in size)
    numbers = [value for value in (*mean, *std) if isinstance(value, int | float) and math.isfinite(value)]
    if not whole or len(mean) != len(std) or len(numbers) != 2 * len(mean) or any(value == 0 for value in std):
        raise ValueError("its preparation is malformed")
    if not all(isinstance(label, str) for label in labels):
        raise ValueError("its labels are malformed")
    interpolation, crop = found.get("interpolation", "bilinear"), found.get("crop", 1.0)
    assumed = found.get("assumed", [])
    if not isinstance(assumed, list) or not all(each in ("size", "mean", "std") for each in assumed):
        raise ValueError("its preparation is malformed")
    if interpolation not in INTERPOLATIONS or not isinstance(crop, int | float) or not 0 < crop <= 1:
        raise ValueError("its preparation is malformed")
    return Preparation(
        (size[0], size[1]), tuple(map(float, mean)), tuple(map(float, std)), tuple(labels), interpolation, float(crop),
        source="" if assumed else "the file", assumed=tuple(assumed),
    )  # fmt: skip


def _bad(path: str | Path, what: str) -> FileError:
    return FileError(f"{path} cannot be used: at byte {container.HEADER.size}, in its manifest, {what}")
