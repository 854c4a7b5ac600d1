"""Layers as least-squares problems: rows of what a layer reads and gives, at the same sampled positions.

Images differ more than the positions of one image, so all images take part and share their positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tersenet.bricks.mask import only_masked
from tersenet.graph.outside_reads import read_by_graph

# An activation of all images together, or the rows of one least-squares problem: 2^26 floats are 256 MiB.
FLOATS = 2**26
_ROWS = 2**14  # and at least four times the unknowns


def is_plain(module: Any, masked: bool = False) -> bool:
    """Whether a layer computes what its weight says; bricks and parametrized layers compute something else.

    Args:
        masked: whether a layer counts that has a mask and nothing else in front of its weight.
    """
    kind = type(module).__bases__[0] if masked and only_masked(module) else type(module)
    if kind is nn.Conv2d:
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return kind is nn.Linear


def plain_calls(graph: fx.GraphModule, masked: bool = False) -> dict[str, fx.Node]:
    """path -> node of the plain layers that are called once, and of whose numbers the graph reads nothing else, in the
    graph's order."""
    read = read_by_graph(graph)
    nodes: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            nodes.setdefault(str(node.target), []).append(node)
    return {
        path: calls[0]
        for path, calls in nodes.items()
        if len(calls) == 1 and path not in read and is_plain(graph.get_submodule(path), masked)
    }


def size(node: fx.Node) -> int:
    """Numbers in a node's output, for the batch that the graph was traced with."""
    count = 1
    for length in node.meta.get("shape", ()):
        count *= length
    return count


def fitting(graph: fx.GraphModule) -> int:
    """How many samples run together so that each activation of all of them fits in memory; at least 8."""
    nodes = list(graph.graph.nodes)
    samples = next(node.meta["shape"][0] for node in nodes if node.op == "placeholder")
    return max(8, FLOATS // max(1, max(map(size, nodes)) // samples))


def places(node: fx.Node, module: Any, images: int) -> Tensor:
    """(P,) positions of a layer's output that take part: enough for four rows per unknown, or all there are."""
    unknowns = module.weight[0].numel()
    rows = min(max(_ROWS, 4 * unknowns), FLOATS // (unknowns * getattr(module, "groups", 1)))
    count = size(node) // node.meta["shape"][0] // module.weight.shape[0]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[: max(1, -(-rows // images))].sort().values.to(module.weight.device)


def given(value: Tensor, module: nn.Module, chosen: Tensor) -> Tensor:
    """(N, O, H, W) of a convolution or (N, ..., O) -> (R, O), R = N times the number of positions."""
    if not isinstance(module, nn.Linear):
        value = value.movedim(1, -1)
    return value.flatten(1, -2)[:, chosen].flatten(0, 1) if value.dim() > 2 else value


def read(value: Tensor, module: Any, chosen: Tensor) -> Tensor:
    """(N, I, H, W) of a convolution -> (R, I K K), what its kernel sees; (N, ..., I) of a linear layer -> (R, I)."""
    if isinstance(module, nn.Linear):
        return given(value, module, chosen)
    (top, left), (down, across) = module.padding, module.stride
    padded = F.pad(value, (left, left, top, top))
    reach = module.dilation[1] * (module.kernel_size[1] - 1) + 1
    width = (padded.shape[3] - reach) // across + 1  # of the output
    ys = _seen(chosen // width * down, module.kernel_size[0], module.dilation[0])
    xs = _seen(chosen % width * across, module.kernel_size[1], module.dilation[1])
    patches = padded[:, :, ys[:, :, None], xs[:, None, :]]  # (N, I, P, K, K)
    return patches.transpose(1, 2).flatten(2).flatten(0, 1)


def _seen(start: Tensor, size: int, dilation: int) -> Tensor:
    """(P,) -> (P, K): the coordinates that a kernel sees from where it starts."""
    return start[:, None] + dilation * torch.arange(size, device=start.device)
