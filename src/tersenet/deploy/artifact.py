"""Models as .terse files: plain data that loads without the model's class, runs, trains on and exports.

The container and the coding are in `tersenet.codec`, the graph's form in `tersenet.deploy.graph_json`; this puts a
model's graph, input and output, preparation, plan and provenance into the manifest, and its state dict beside it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tersenet.bricks.evaluating import evaluating
from tersenet.bricks.settle import settle
from tersenet.codec import container
from tersenet.deploy import graph_json
from tersenet.deploy.lazy import keep_coded
from tersenet.deploy.runner import Input
from tersenet.errors import ExportError, FileError, SettingsError
from tersenet.graph.trace import trace
from tersenet.task import Preparation

_KIND = "model"
_MAX_RANK = 16


def save_terse(
    model: nn.Module,
    example: Tensor,
    path: str | Path,
    preparation: Preparation | None = None,
    provenance: dict[str, Any] | None = None,
    plan: dict[str, Any] | None = None,
) -> Path:
    """Writes a model, settled (on a copy), as one file; whole or not at all.

    Args:
        model: any module of one input that `trace` can capture.
        example: (N, ...); its values are used once, to see that what the file holds computes the same.
        provenance: where the model came from; JSON. The versions of tersenet and torch are added.
        plan: the plan of the steps that made it; JSON.
    Raises:
        TraceError: when the forward cannot be captured.
        ExportError: when the model holds a layer or operator that a file cannot, or the file would compute otherwise.
    """
    settled = settle(copy.deepcopy(model)).cpu()
    example = example.detach().cpu()
    graph = trace(settled, example)
    tensors = {name: _without_signed_zeros(value.detach()) for name, value in graph.state_dict().items()}
    manifest: dict[str, Any] = {
        "kind": _KIND,
        "graph": graph_json.to_json(graph),
        "input": {"shape": [None, *example.shape[1:]], "dtype": str(example.dtype).removeprefix("torch.")},
        "outputs": [
            [None, *node.meta["shape"][1:]] if "shape" in node.meta else None
            for node in next(node for node in graph.graph.nodes if node.op == "output").all_input_nodes
        ],
        "preparation": None if preparation is None else dataclasses.asdict(preparation),
        "plan": plan if plan is not None else {},
        "provenance": {"tersenet": metadata.version("tersenet"), "torch": torch.__version__, **(provenance or {})},
    }
    _check_rebuilt(settled, manifest["graph"], tensors, example)
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
        shape = _input_shape(manifest)
        model = graph_json.from_json(manifest.get("graph"), tensors)
    except (ValueError, RuntimeError, RecursionError) as error:
        raise _bad(path, str(error) or "it is nested too deeply") from error
    if lazy:
        keep_coded(model, stored.tensor)
    model.input_shape = shape  # type: ignore[assignment]
    model.inputs = (Input("input", shape, manifest["input"]["dtype"]),)  # type: ignore[assignment]
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
            return Preparation((height, width), (0.5,) * channels, (0.5,) * channels)  # type: ignore[arg-type, operator]
        return _preparation(found)
    except ValueError as error:
        raise _bad(path, str(error)) from error


def unpack(path: str | Path, out: str | Path) -> Path:
    """Writes a .terse file as one that needs no tersenet: a program (.pt2, .onnx) or its tensors alone (.safetensors).

    Raises:
        FileError: when the file cannot be read.
        SettingsError: for another ending.
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
    example = torch.zeros([2, *model.input_shape[1:]], dtype=graph_json.DTYPES[manifest["input"]["dtype"]])  # type: ignore[index]
    preparation = terse_preparation(path) if manifest.get("preparation") is not None else None
    if out.suffix == ".onnx":
        from tersenet.deploy.onnx import export_onnx

        return export_onnx(model, example, out, preparation)
    from tersenet.deploy.pt2 import export_pt2

    return export_pt2(model, example, out, None if preparation is None else preparation.metadata())


def _without_signed_zeros(value: Tensor) -> Tensor:
    """-0.0 as 0.0, its equal: masks and rounding leave both, and only one of them is on a grid."""
    return value + 0.0 if value.is_floating_point() else value


def _check_rebuilt(model: nn.Module, graph: dict[str, Any], tensors: dict[str, Tensor], example: Tensor) -> None:
    """What the file will hold must compute what the model computes."""
    try:
        rebuilt = graph_json.from_json(graph, {name: value.clone() for name, value in tensors.items()})
    except ValueError as error:
        raise ExportError(f"{type(model).__name__} cannot be written as a .terse file: {error}") from error
    with evaluating(model), torch.no_grad():
        pairs = zip(pytree.tree_leaves(model(example)), pytree.tree_leaves(rebuilt(example)), strict=True)
    for expected, found in pairs:
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


def _preparation(found: Any) -> Preparation:
    if not isinstance(found, dict) or set(found) != {"size", "mean", "std", "labels"}:
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
    return Preparation((size[0], size[1]), tuple(map(float, mean)), tuple(map(float, std)), tuple(labels))


def _bad(path: str | Path, what: str) -> FileError:
    return FileError(f"{path} cannot be used: at byte {container.HEADER.size}, in its manifest, {what}")
