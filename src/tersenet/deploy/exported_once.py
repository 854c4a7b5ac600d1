"""A graph that was written as ONNX before is not exported again.

The rows of a run often ship the same graph: batch norms are folded in every file, so the step that folds them changes
none, and a search writes files that the run writes again. torch's exporter takes seconds for each.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tersenet.graph.structure import serial, structure

_MOST_BYTES = 256 * 2**20  # of all files that are kept
_known: OrderedDict[str, bytes] = OrderedDict()


def exported_once(graph: fx.GraphModule, inputs: Sequence[Tensor], export: Callable[[], Any]) -> Any:
    """The ONNX model of a graph: what `export` makes, or what it made before of the same graph with the same numbers.

    Args:
        inputs: what the graph is exported with; only their shapes and types matter.
        export: makes an onnx.ModelProto.
    """
    key = _contents(graph, inputs)
    if (known := _known.get(key)) is not None:
        import onnx  # export has made one before

        _known.move_to_end(key)
        return onnx.ModelProto.FromString(known)
    proto = export()
    if proto.ByteSize() <= _MOST_BYTES:
        _known[key] = proto.SerializeToString()
        while sum(map(len, _known.values())) > _MOST_BYTES:
            _known.popitem(last=False)
    return proto


def _contents(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> str:
    digest = hashlib.sha256(structure(graph, inputs).encode())
    for node in graph.graph.nodes:
        digest.update(repr((node.name, serial(node.target) if callable(node.target) else node.target)).encode())
    for name, tensor in (
        *graph.named_parameters(remove_duplicate=False),
        *graph.named_buffers(remove_duplicate=False),
    ):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
