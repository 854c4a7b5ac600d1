"""An ONNX file as a model that every step takes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from tersenet.deploy.made_inputs import made_example, made_inputs
from tersenet.deploy.runner import Input
from tersenet.errors import InputWarning, ModelError, TraceError
from tersenet.graph.trace import fixed_batch, trace
from tersenet.onnx_import.network import Network
from tersenet.onnx_import.original import Original
from tersenet.onnx_import.read import File, read
from tersenet.onnx_import.values import as_tensor
from tersenet.onnx_import.verify import verify
from tersenet.task import Preparation

_COLORS = (1, 3, 4)
_BATCHES = (2, 3)  # that an import is verified with


def open_onnx(path: str | Path, size: Sequence[int] | None = None) -> tuple[nn.Module, Preparation | None]:
    """Reads a float ONNX file of operator set 9 or newer.

    The model is a captured graph of torch.nn layers under their names in the file, with an open batch, in evaluation
    mode. Its outputs are those of ONNX Runtime, held at two batches to 1e-4 of the largest entry of each; several are
    a dict by their names. It has `inputs`, as models of other files have, and `preparation` where the file says it.

    Args:
        path: ends in .onnx; its external data lies beside it.
        size: (H, W), for a file that takes images of any size.
    Returns:
        the model, and how its images are prepared: as the file says, else a mean and std of 0.5; None for a model that
        takes something else than images (N, C, H, W).
    Raises:
        FileError: when the file cannot be read.
        ModelError: when it is quantized, has an operator that is not known or sizes that are open, or is not computed
            as ONNX Runtime computes it.
        MissingExtra: when onnx or onnxruntime is not installed.
    """
    file = read(Path(path))
    own = Preparation.of_metadata(file.metadata)
    last = _is_channels_last(file.inputs[0]) if file.inputs else False
    inputs = _sized(file, last, size, own)
    network = Network(file.proto, file.name, last)
    original = Original(file, last)
    arrays = made_inputs(file.name, inputs, 2, _lowest(inputs))
    if original.batch is None and not original.takes(arrays):
        original.batch = 1
    model = _captured(network, original, arrays)
    model.inputs = inputs  # type: ignore[assignment]
    _name_inputs(model, inputs)
    made = made_example(model, file.name)
    tensors = made if isinstance(made, tuple) else (made,)
    limits = {each.name: int(x.max()) + 1 for each, x in zip(inputs, tensors, strict=True)}
    for batch in _BATCHES:
        verify(model, network, original, made_inputs(file.name, inputs, batch, limits))
    if last:
        warnings.warn(
            f"{file.name} takes images (N, H, W, C); the model that is made of it takes (N, C, H, W)",
            InputWarning,
            stacklevel=2,
        )
    model.training = False
    preparation = _preparation(inputs, own)
    if own is not None and preparation is not None:
        model.preparation = preparation  # type: ignore[assignment]
    return model, preparation


def _captured(network: Network, original: Original, arrays: Sequence[np.ndarray]) -> fx.GraphModule:
    tensors = tuple(map(as_tensor, arrays))
    with torch.no_grad():
        if original.batch is not None:
            repeats = -(-original.batch // len(tensors[0]))
            network.record([x.repeat(repeats, *[1] * (x.dim() - 1))[: original.batch] for x in tensors])
        network(*tensors)
    try:
        graph = trace(network, tensors if len(tensors) > 1 else tensors[0])
    except TraceError as error:
        if isinstance(error.__cause__, ModelError):  # an operator's own sentence
            raise error.__cause__ from None
        raise ModelError(f"{network.file} cannot be imported: {error}") from error
    if (fixed := fixed_batch(graph)) is not None:
        raise ModelError(
            f"{network.file} computes with a batch of one size alone, while models here take any; export it with an "
            f"open batch ({fixed})"
        )
    return graph


def _name_inputs(graph: fx.GraphModule, inputs: Sequence[Input]) -> None:
    """The graph's inputs get their names in the file, where these can be names of arguments."""
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    taken = {node.name for node in graph.graph.nodes}
    for node, each in zip(places, inputs, strict=True):
        if each.name.isidentifier() and each.name not in taken:
            node.target = each.name
    graph.recompile()


def _is_channels_last(first: Input) -> bool:
    if len(first.shape) != 4 or not str(first.dtype).startswith("float"):
        return False
    return first.shape[3] in _COLORS and first.shape[1] not in _COLORS


def _lowest(inputs: Sequence[Input]) -> dict[str, int]:
    """Integers are 0 while nothing is known about them: the first place of any table."""
    return {each.name: 1 for each in inputs}


def _sized(file: File, last: bool, size: Sequence[int] | None, own: Preparation | None) -> tuple[Input, ...]:
    """The inputs with every size but the batch, images as (N, C, H, W).

    Raises:
        ModelError: where a size is open and nobody says it, or is fixed and somebody says another.
    """
    found = []
    for place, each in enumerate(file.inputs):
        if each.shape[0] is None and len(each.shape) == 1:
            raise ModelError(f"{file.name} takes {each.name!r} of one dimension; inputs (N, ...) are supported")
        shape: list[Any] = list(each.shape)
        if place == 0 and len(shape) == 4:
            shape = [shape[0], shape[3], shape[1], shape[2]] if last else shape
            shape[1] = shape[1] or (own.channels if own is not None else 3)
            shape[2:] = _image_size(file, shape[2:], size, own)
        if None in shape[1:]:
            raise ModelError(
                f"{file.name} takes {each.name!r} of shape {each.said}, whose sizes are open; fix all but the batch "
                "in the file"
            )
        found.append(Input(each.name, (None, *shape[1:]), each.dtype))
    if not found:
        raise ModelError(f"{file.name} takes no input")
    return tuple(found)


def _image_size(file: File, fixed: Sequence[Any], size: Sequence[int] | None, own: Preparation | None) -> list[int]:
    known = size or (own.size if own is not None else None)
    if None not in fixed:
        if size is not None and list(size) != list(fixed):
            raise ModelError(
                f"{file.name} takes images of {fixed[0]}x{fixed[1]} alone, and --image-size is {size[0]}x{size[1]}; "
                "leave it out, or export the model for that size"
            )
        return [int(each) for each in fixed]
    if known is None:
        raise ModelError(
            f"{file.name} takes images of any size; say which with --image-size, such as 224 or 480x640 (H x W)"
        )
    if any(one not in (None, each) for one, each in zip(fixed, known, strict=True)):
        said = "x".join("any" if each is None else str(each) for each in fixed)
        raise ModelError(f"{file.name} takes images of {said}, and {known[0]}x{known[1]} is asked for")
    return [int(each) for each in known]


def _preparation(inputs: Sequence[Input], own: Preparation | None) -> Preparation | None:
    first = inputs[0]
    if len(inputs) > 1 or len(first.shape) != 4 or not str(first.dtype).startswith("float"):
        return None
    channels, *size = (int(each) for each in first.shape[1:] if each is not None)
    if own is not None and own.channels == channels:
        return dataclasses.replace(own, size=(size[0], size[1]))
    return dataclasses.replace(Preparation.unknown((size[0], size[1]), channels), assumed=("mean", "std"))
