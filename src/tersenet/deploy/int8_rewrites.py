"""Exact rewrites of the export copy, in place of operators that a runtime computes wrong inside of an int8 network.

Found by comparing each runtime with the file's own meaning (ONNX Runtime without optimization), over sizes and batches.
OpenVINO 2026 moves the zero point of integers behind the operator that reads them, and merges the fake quantization
behind a reduction into the reduction's kernel:

- A mean of integers with a zero point loses it now and then, by layout and batch size; so does a sum. Both become
  products of matrices with a constant one, which stay float. Without a zero point (behind a ReLU) they are right.
- A maximum or minimum of fewer than four dimensions, those reduced dropped, is off by its own size. With four
  dimensions and the reduced ones kept it is right, so other reductions get that form. It moves no data.
  Behind a float convolution and in adaptive max pools that form is wrong, too: a minimum of two values stands behind
  every maximum, which keeps the fake quantization out of its kernel.
- A constant that is expanded to the batch (a class token) and concatenated makes other layers lose their bias, or
  OpenVINO stops: the concatenation becomes a Pad of floats plus a constant, which needs no batch size. So do the
  statistics of an instance norm, which the exporter repeats for each sample: it becomes a batch norm.

Where it is enough that an operator reads floats, `read_floats.py` says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from tersenet.deploy.kept_in_float import in_float
from tersenet.deploy.read_floats import plain_float, quantizer_of, read_floats
from tersenet.graph.points import clip_bounds, is_global_pool, signed_quantizers

aten = torch.ops.aten

_MEANS = {aten.mean.dim, aten.sum.dim_IntList}
_REDUCTIONS = {*_MEANS, aten.amax.default, aten.amin.default}
_CONCATS = {aten.cat.default, aten.concat.default}
_MAXIMA = {
    aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim, aten.adaptive_max_pool1d.default,
    aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default,
}  # fmt: skip
_RANK = 4


def rewrite_for_int8(graph: fx.GraphModule) -> None:
    """Applies all rewrites to a quantized graph, in place."""
    _keep_maxima_apart(graph)
    for node in list(graph.graph.nodes):
        if node.target in _REDUCTIONS or is_global_pool(graph, node):
            _rewrite_reduction(graph, node)
        elif node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), _InstanceNorm):
            _fix_statistics(graph, str(node.target))
        elif node.target in _CONCATS:
            _concatenate_by_addition(graph, node)
    read_floats(graph)
    graph.recompile()


def _keep_maxima_apart(graph: fx.GraphModule) -> None:
    """Nothing of what stands behind a maximum or minimum over many values becomes part of its kernel."""
    for node in list(graph.graph.nodes):
        layer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if node.target not in _MAXIMA and not isinstance(layer, nn.modules.pooling._AdaptiveMaxPoolNd):
            continue
        values = [node] if "shape" in node.meta else [user for user in node.users if user.args[1:] == (0,)]
        for value in values:
            with graph.graph.inserting_after(value):
                plain = graph.graph.call_function(in_float, (value,))
            plain.meta = dict(value.meta)
            value.replace_all_uses_with(plain, delete_user_cb=lambda user, own=plain: user is not own)


def has_zero_point(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a value comes, moved, chosen or clipped at most, out of integers whose zero is not 0 in the file."""
    while clip_bounds(graph, node) is not None:
        node = node.args[0]  # type: ignore[assignment]
    path = quantizer_of(graph, node)
    if path is None:
        return False
    quantizer: Any = graph.get_submodule(path)
    zero = int(quantizer.zero_point)
    return zero != 0 and not (zero == 128 and quantizer.bits == 8 and path in signed_quantizers(graph))


def _rewrite_reduction(graph: fx.GraphModule, node: fx.Node) -> None:
    source, reduced, keepdim = node.args[0], *_settings(graph, node)
    if not isinstance(source, fx.Node) or not source.meta.get("shape") or reduced is None:
        return
    shape = source.meta["shape"]
    reduced = sorted(dim % len(shape) for dim in reduced) or list(range(len(shape)))
    averages = node.target in _MEANS or is_global_pool(graph, node)
    if averages and 0 not in reduced and has_zero_point(graph, source):
        factor = 1.0 if node.target is aten.sum.dim_IntList else 1 / math.prod(shape[dim] for dim in reduced)
        _replace(graph, node, _Product(shape, reduced, keepdim, factor), source)
    elif node.target in _REDUCTIONS and len(shape) < _RANK:
        _reduce_in_four_dimensions(graph, node, reduced, keepdim)


def _settings(graph: fx.GraphModule, node: fx.Node) -> tuple[list[int] | None, bool]:
    """The dimensions, None where they are not plain numbers or a type is asked for; and whether they are kept."""
    if is_global_pool(graph, node):
        return [2, 3], len(node.meta["shape"]) == _RANK
    if set(node.kwargs) - {"dim", "keepdim"} or len(node.args) > 3:
        return None, False
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", [])
    keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    dims = [] if dims is None else dims
    plain = isinstance(dims, list | tuple) and all(isinstance(dim, int) for dim in dims)
    return [int(dim) for dim in dims] if plain else None, bool(keepdim)  # type: ignore[union-attr, arg-type]


class _Product(nn.Module):
    """A mean or sum over some dimensions, not the first, as a product of matrices with a constant one.

    Args:
        shape: of the input; its first size does not matter.
        reduced: which dimensions, rising.
        factor: of the sum.
    """

    ones: Tensor

    def __init__(self, shape: Sequence[int], reduced: Sequence[int], keepdim: bool, factor: float) -> None:
        super().__init__()
        kept = [dim for dim in range(len(shape)) if dim not in reduced]
        together = list(reduced) == list(range(reduced[0], reduced[-1] + 1))
        self.order = [*range(len(shape))] if together else [*kept, *reduced]
        first, count = self.order.index(reduced[0]), math.prod(shape[dim] for dim in reduced)
        before, after = self.order[1:first], self.order[first + len(reduced) :]
        self.matrices = [-1, math.prod(shape[dim] for dim in before), count, math.prod(shape[dim] for dim in after)]
        sizes = [shape[dim] if dim in kept else 1 for dim in range(len(shape)) if keepdim or dim in kept]
        self.result = [-1, *sizes[1:]]
        self.register_buffer("ones", torch.full((count, 1), factor))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.order == sorted(self.order) else x.permute(self.order)
        if self.matrices[-1] == 1:
            return (x.reshape(self.matrices[:-1]) @ self.ones).reshape(self.result)
        return (self.ones.T @ x.reshape(self.matrices)).reshape(self.result)


def _reduce_in_four_dimensions(graph: fx.GraphModule, node: fx.Node, reduced: list[int], keepdim: bool) -> None:
    """(..., d) reduced as (..., d, 1) is, with the reduced dimensions kept, then squeezed."""
    source: Any = node.args[0]
    shape = source.meta["shape"]
    added = list(range(len(shape), _RANK))
    # The mean over the last of three dimensions is then one over H and W, which has integer kernels.
    over = reduced + added if reduced == [2] else reduced
    with graph.graph.inserting_before(node):
        wide = source
        for _ in added:
            wide = graph.graph.call_function(aten.unsqueeze.default, (wide, -1))
        wide.meta = {**source.meta, "shape": (*shape, *(1 for _ in added))}
        inner = graph.graph.call_function(node.target, (wide, over, True))  # type: ignore[arg-type]
        sizes = tuple(1 if dim in over else size for dim, size in enumerate(wide.meta["shape"]))
        inner.meta = {**node.meta, "shape": sizes}
        result = graph.graph.call_function(aten.squeeze.dims, (inner, [*([] if keepdim else reduced), *added]))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.graph.erase_node(node)


def _concatenate_by_addition(graph: fx.GraphModule, node: fx.Node) -> None:
    """Writes a concatenation of one value with constants (a class token) as a padded value plus a constant."""
    parts: Any = node.args[0]
    dim = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(node.meta["shape"])  # type: ignore[arg-type]
    constants = [_constant(graph, part) for part in parts]
    values = [part for part, constant in zip(parts, constants, strict=True) if constant is None]
    if dim == 0 or len(values) != 1 or len(parts) == 1:
        return
    place, width = parts.index(values[0]), values[0].meta["shape"][dim]
    rest = next(constant for constant in constants if constant is not None)
    zeros = torch.zeros([width if at == dim else size for at, size in enumerate(rest.shape)])
    whole = torch.cat([zeros if constant is None else constant for constant in constants], dim)
    before = sum(constant.shape[dim] for constant in constants[:place] if constant is not None)
    sides = [0, 0] * (whole.dim() - 1 - dim) + [before, whole.shape[dim] - before - width]
    _replace(graph, node, _PaddedPlus(sides, whole), values[0])


def _constant(graph: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """(1, ...): a parameter or buffer that is at most expanded along the batch; None for other values."""
    source: Any = node.args[0] if node.op == "call_function" and node.target is aten.expand.default else node
    if source.op != "get_attr":
        return None
    value: Any = graph
    for name in str(source.target).split("."):
        value = getattr(value, name)
    shape = node.meta.get("shape", tuple(value.shape))
    expanded = value.dim() == len(shape) and value.shape[0] == 1 and tuple(value.shape[1:]) == tuple(shape[1:])
    return value.detach() if expanded else None


class _PaddedPlus(nn.Module):
    """x padded with zeros by `sides`, plus a constant (1, ...)."""

    constant: Tensor

    def __init__(self, sides: list[int], constant: Tensor) -> None:
        super().__init__()
        self.sides = sides
        self.register_buffer("constant", constant.clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(plain_float(x), self.sides) + self.constant


def _fix_statistics(graph: fx.GraphModule, path: str) -> None:
    """Makes batch norms of instance norms that keep statistics; the exporter repeats those for each sample."""
    norm: Any = graph.get_submodule(path)
    kinds = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    kind = kinds[next(len(node.meta["shape"]) for node in graph.graph.nodes if node.target == path)]
    if norm.running_mean is not None:
        same = kind(norm.num_features, norm.eps, affine=norm.affine).eval()
        same.load_state_dict(norm.state_dict())
        graph.add_submodule(path, same)


def _replace(graph: fx.GraphModule, node: fx.Node, module: nn.Module, source: fx.Node) -> None:
    path = f"rewritten.{node.name}"
    graph.add_submodule(path, module)
    with graph.graph.inserting_before(node):
        result = graph.graph.call_module(path, (source,))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.graph.erase_node(node)
