"""Exact rewrites of the export copy, in place of operators that a runtime computes wrong inside of an int8 network.

Found by comparing each runtime with the file's own meaning (ONNX Runtime without optimization), over sizes and batches:

- OpenVINO 2026 merges the fake quantization behind a reduction into the reduction's kernel. Of tensors of fewer than
  four dimensions it then computes something else: a mean of integers with a zero point gives values that depend on the
  batch size, and a maximum or minimum of floats whose reduced dimensions are dropped is off by its own size. With four
  dimensions and the reduced ones kept it is right, so reductions get that form. It moves no data.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from tersenet.bricks.quantizer import Quantizer

aten = torch.ops.aten

_REDUCTIONS = {aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default}
_RANK = 4


def rewrite_for_int8(graph: fx.GraphModule) -> None:
    """Applies all rewrites to a quantized graph, in place; a graph without quantizers stays as it is."""
    if not any(isinstance(module, Quantizer) for module in graph.modules()):
        return
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in _REDUCTIONS:
            _reduce_in_four_dimensions(graph, node)
    graph.recompile()


def _reduce_in_four_dimensions(graph: fx.GraphModule, node: fx.Node) -> None:
    """(..., d) reduced as (..., d, 1) is, with the reduced dimensions kept, then squeezed."""
    given = _arguments(node)
    shape = node.args[0].meta.get("shape", ()) if isinstance(node.args[0], fx.Node) else ()
    rank = len(shape)
    if given is None or rank == 0:
        return
    dims, keepdim = given
    reduced = sorted(dim % rank for dim in dims) or list(range(rank))
    count = math.prod(shape[dim] for dim in reduced)
    sums = node.target is aten.sum.dim_IntList and 0 not in reduced  # the batch is no number
    if rank >= _RANK and not sums:
        return
    added = list(range(rank, _RANK))
    # The mean over the last of three dimensions is then one over H and W, which has integer kernels.
    over = reduced + added if reduced == [2] else reduced
    with graph.graph.inserting_before(node):
        wide: Any = node.args[0]
        for _ in added:
            wide = graph.graph.call_function(aten.unsqueeze.default, (wide, -1))
        if added:
            wide.meta = {**node.args[0].meta, "shape": (*shape, *(1 for _ in added))}
        inner = graph.graph.call_function(aten.mean.dim if sums else node.target, (wide, over, True))
        inner.meta = {
            **node.meta,
            "shape": tuple(1 if d in over else n for d, n in enumerate(wide.meta["shape"])),
        }
        drop = [*([] if keepdim else reduced), *added]
        result = graph.graph.call_function(aten.squeeze.dims, (inner, drop)) if drop else inner
        result.meta = dict(node.meta)
        if sums:
            result = graph.graph.call_function(aten.mul.Tensor, (result, float(count)))
            result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.graph.erase_node(node)


def _arguments(node: fx.Node) -> tuple[list[int], bool] | None:
    """The dimensions and whether they are kept; None where they are not plain numbers, or a type is asked for."""
    if set(node.kwargs) - {"dim", "keepdim"} or len(node.args) > 3:
        return None
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", [])
    keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    dims = [] if dims is None else dims
    if not isinstance(dims, list | tuple) or not all(isinstance(dim, int) for dim in dims):
        return None
    return [int(dim) for dim in dims], bool(keepdim)  # type: ignore[arg-type]
