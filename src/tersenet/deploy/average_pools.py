"""Average pools as ONNX operators that every runtime computes alike, float and in integers. Exact.

PyTorch divides a window at the border by the part of it that lies on the input and its padding, or by
`divisor_override`. What becomes of that differs: the exporter drops the divisor; with `ceil_mode` runtimes divide by
other counts, ONNX Runtime's integer kernel by the whole window's; OpenVINO takes padding of integers with a zero point
for zeros of the integers, and merges a Pad of its own into the pool. So the pool here is that over the part of a window
that lies on the input, which all compute alike, times what it makes of the whole window: a constant for each place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersenet.deploy.kept_in_float import in_float

aten = torch.ops.aten

_FUNCTIONS = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}
_LAYERS = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}


@dataclass(frozen=True)
class _Pool:
    """The settings of an average pool, one number for each spatial dimension.

    Args:
        ragged: how far the last window reaches beyond the padded input.
    """

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    ragged: list[int]
    counts_padding: bool
    divisor: int | None

    def factors(self, sizes: Sequence[int]) -> Tensor | None:
        """(1, 1, ...) or (): what the mean over a window's part of the input is to be multiplied by; None for 1.

        Args:
            sizes: of the input, in each spatial dimension.
        """
        inside, counted = torch.ones(1), torch.ones(1)
        for size, width, step, pad, more in zip(
            sizes, self.kernel, self.stride, self.padding, self.ragged, strict=True
        ):
            start = torch.arange(-pad, size + pad + more - width + 1, step)
            ends = [(start + width).clamp(max=limit) for limit in (size, size + pad)]
            inside = inside[..., None] * (ends[0] - start.clamp(min=0))
            counted = counted[..., None] * (ends[1] - start)
        if self.divisor is not None:
            counted = torch.full_like(inside, self.divisor)
        elif not self.counts_padding:
            return None
        factors = inside / counted
        if bool((factors == factors.flatten()[0]).all()):
            return None if float(factors.flatten()[0]) == 1 else factors.flatten()[0]
        return factors[None]

    def differs(self, quantized: bool) -> bool:
        """Whether runtimes may compute something else for the plain operator."""
        padded = quantized and self.counts_padding and any(self.padding)
        return self.divisor is not None or any(self.ragged) or padded


def rewrite_average_pools(graph: fx.GraphModule, quantized: bool) -> None:
    """Replaces the average pools that some runtime would compute otherwise, in place."""
    for node in list(graph.graph.nodes):
        pool = _pool(graph, node)
        if pool is not None and pool.differs(quantized):
            path = f"average_pools.{node.name}"
            graph.add_submodule(path, _AsOnnx(pool, node.args[0].meta["shape"][2:], node.meta["shape"][2:], quantized))
            with graph.graph.inserting_before(node):
                new = graph.graph.call_module(path, (node.args[0],))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.graph.erase_node(node)
    graph.recompile()


def _pool(graph: fx.GraphModule, node: fx.Node) -> _Pool | None:
    if node.op == "call_module":
        layer: Any = graph.get_submodule(str(node.target))
        dims = _LAYERS.get(type(layer))
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
        given = [getattr(layer, name) for name in names] if dims else []
        given.append(getattr(layer, "divisor_override", None))
    elif node.op == "call_function" and node.target in _FUNCTIONS:
        dims = _FUNCTIONS[node.target]
        defaults: dict[str, Any] = {
            "kernel_size": None,
            "stride": [],
            "padding": 0,
            "ceil_mode": False,
            "count_include_pad": True,
        }
        defaults["divisor_override"] = None
        settings = {**defaults, **dict(zip(defaults, node.args[1:], strict=False)), **node.kwargs}
        given = [settings[name] for name in defaults]
    else:
        return None
    sizes = node.args[0].meta.get("shape", ()) if isinstance(node.args[0], fx.Node) else ()
    if not dims or len(sizes) != dims + 2 or "shape" not in node.meta:
        return None
    kernel, padding = _spread(given[0], dims), _spread(given[2], dims)
    stride = _spread(given[1], dims) if given[1] not in (None, [], ()) else kernel
    outputs = node.meta["shape"][2:]
    ragged = [
        max(0, (out - 1) * step + width - size - 2 * pad)
        for out, step, width, size, pad in zip(outputs, stride, kernel, sizes[2:], padding, strict=True)
    ]
    return _Pool(kernel, stride, padding, ragged, bool(given[4]), given[5])


def _spread(value: int | Sequence[int], dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


class _AsOnnx(nn.Module):
    """(N, C, ...) -> (N, C, ...) of the sizes in `shape`; `sizes` are those of the input.

    In a quantized network OpenVINO would round the average to 8 bits before the factor, so that pool stays in float.
    """

    factors: Tensor | None

    def __init__(self, pool: _Pool, sizes: Sequence[int], shape: Sequence[int], quantized: bool) -> None:
        super().__init__()
        after = [pad + more for pad, more in zip(pool.padding, pool.ragged, strict=True)]
        windows = {"kernel_shape": pool.kernel, "strides": pool.stride, "pads": [*pool.padding, *after]}
        self.attributes: dict[str, Any] = {**windows, "count_include_pad": 0}
        self.shape = tuple(shape)
        self.register_buffer("factors", pool.factors(sizes))
        self.in_float = quantized and self.factors is not None

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], *self.shape)
        x = in_float(x) if self.in_float else x
        averaged = torch.onnx.ops.symbolic("AveragePool", (x,), self.attributes, dtype=x.dtype, shape=shape)
        return averaged if self.factors is None else averaged * self.factors
