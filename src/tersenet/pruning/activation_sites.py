"""Where a network's activations can be cut, and putting thresholds there.

A site is a value that an activation function makes and that a convolution or linear layer reads, directly or through
operators that keep its zeros (max pooling, concatenation, reshaping, a gate's multiplication). Zeros elsewhere save no
multiplication: behind a global average there are none left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from tersenet.bricks.quantizer import Quantizer
from tersenet.bricks.threshold import Threshold
from tersenet.graph.points import clip_bounds
from tersenet.step import Step

THRESHOLDS = "thresholds"
# What may be cut: what a ReLU (or a clip from zero) made, what any activation function made, or whatever is read.
PLACES = ("relu", "activations", "inputs")
READERS = (_ConvNd, nn.Linear)

_SMOOTH_LAYERS = (
    nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU, nn.PReLU, nn.Tanh, nn.Softplus,
    nn.Hardtanh, nn.Softsign,
)  # fmt: skip
_SMOOTH = frozenset(
    (
        "gelu", "silu", "mish", "hardswish", "elu", "celu", "selu", "leaky_relu", "prelu", "tanh", "softplus",
        "hardtanh",
    )
)  # fmt: skip
_KEEP_ZEROS_LAYERS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd,
    nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, Quantizer, Threshold,
)  # fmt: skip
_KEEP_ZEROS = frozenset(
    (
        "max_pool1d", "max_pool2d", "max_pool3d", "flatten", "unflatten", "view", "reshape", "permute", "transpose",
        "squeeze", "unsqueeze", "contiguous", "clone", "dropout", "slice", "chunk", "split", "getitem",
        "pixel_shuffle", "channel_shuffle", "cat", "concat", "mul",
    )
)  # fmt: skip
Sites = dict[str, dict[str, Any]]


def activation_sites(graph: fx.GraphModule, places: str, per_channel: bool, step: Step) -> Sites:
    """The sites of a traced model that `step` is allowed to touch, in the order of the forward.

    A site is left alone when one of the layers that read it is left out by `only` or `skip`, so that such a layer
    reads what it read before.

    Args:
        graph: from `graph.trace.trace`.
        places: one of PLACES; for "inputs" the model's own input is no site.
        per_channel: one threshold per channel, where the channels are the second dimension.
    Returns:
        {node: {"channels": C or None, "signed": bool, "readers": [paths of layers]}}.
    """
    readers: dict[fx.Node, list[str]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), READERS):
            for origin in dict.fromkeys(_origins(graph, node.args[0])):
                if _serves(graph, origin, places):
                    readers.setdefault(origin, []).append(str(node.target))
    found: Sites = {}
    for node in graph.graph.nodes:
        paths = list(dict.fromkeys(readers.get(node, ())))
        if paths and all(step.matches(path, graph.get_submodule(path)) for path in paths):
            bounds = clip_bounds(graph, node)
            channels = _channels(graph, node) if per_channel else None
            signed = bounds is None or bounds[0] < 0
            found[node.name] = {"channels": channels, "signed": signed, "readers": paths}
    return found


def insert_thresholds(graph: fx.GraphModule, sites: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts a `Threshold` behind each site, or a new one in place of the one that is there.

    Where a site's value is rounded, the threshold stands behind the rounding and its result is rounded again, which
    changes nothing, so that runtimes still find every layer between two rounded values.

    Raises:
        KeyError: naming the node that the graph does not have.
    """
    by_name = {node.name: node for node in graph.graph.nodes}
    for name, site in sites.items():
        if name not in by_name:
            raise KeyError(name)
        place = _rounded(graph, by_name[name])
        brick = Threshold(site["channels"], site["signed"])
        there = _follower(graph, place, Threshold)
        if there is not None:
            graph.add_submodule(str(there.target), brick)
            continue
        users = list(place.users)
        path = f"{THRESHOLDS}.{name}_out"
        graph.add_submodule(path, brick)
        with graph.graph.inserting_after(place):
            new = graph.graph.call_module(path, (place,))
        new.meta = dict(place.meta)
        last = new
        if _is_call(graph, place, Quantizer):
            with graph.graph.inserting_after(new):
                last = graph.graph.call_module(str(place.target), (new,))
            last.meta = dict(place.meta)
        for user in users:
            user.replace_input_with(place, last)
    graph.recompile()


def thresholds_at(graph: fx.GraphModule, sites: Mapping[str, Any]) -> dict[str, str | None]:
    """Path of the threshold at each of these sites that has one -> path of the quantizer in front of it, or None."""
    found: dict[str, str | None] = {}
    for node in graph.graph.nodes:
        if node.name in sites:
            place = _rounded(graph, node)
            there = _follower(graph, place, Threshold)
            if there is not None:
                found[str(there.target)] = str(place.target) if _is_call(graph, place, Quantizer) else None
    return found


def _origins(graph: fx.GraphModule, node: Any) -> Iterator[fx.Node]:
    """The nodes whose zeros arrive here as zeros, from the nearest ones that make values of their own."""
    if not isinstance(node, fx.Node):
        return
    if _passes(graph, node):
        for source in node.all_input_nodes:
            yield from _origins(graph, source)
    else:
        yield node


def _passes(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), _KEEP_ZEROS_LAYERS)
    return node.op == "call_function" and _name(node) in _KEEP_ZEROS


def _serves(graph: fx.GraphModule, node: fx.Node, places: str) -> bool:
    if node.op not in ("call_module", "call_function") or node.meta.get("dtype") not in (torch.float32, torch.float16):
        return False
    bounds = clip_bounds(graph, node)
    if places == "inputs" or (bounds is not None and bounds[0] == 0):
        return True
    if places == "relu":
        return False
    layer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(layer, _SMOOTH_LAYERS) if layer is not None else _name(node) in _SMOOTH


def _channels(graph: fx.GraphModule, node: fx.Node) -> int | None:
    """How many channels a value has in its second dimension; None where they are not known to be there."""
    shape = node.meta["shape"]
    while node.op in ("call_module", "call_function") and node.meta.get("shape") == shape:
        layer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, _ConvNd | _NormBase | nn.GroupNorm) or (isinstance(layer, nn.Linear) and len(shape) == 2):
            return int(shape[1])
        if _passes(graph, node) or isinstance(layer, nn.Linear) or not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return None


def _rounded(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The quantizer that rounds a value, where there is one; else the value itself."""
    users = list(node.users)
    return users[0] if len(users) == 1 and _is_call(graph, users[0], Quantizer) else node


def _follower(graph: fx.GraphModule, node: fx.Node, kind: type[nn.Module]) -> fx.Node | None:
    return next((user for user in node.users if _is_call(graph, user, kind)), None)


def _is_call(graph: fx.GraphModule, node: fx.Node, kind: type[nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), kind)


def _name(node: fx.Node) -> str:
    """`aten.relu_.default` -> "relu"."""
    return str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target)).rstrip("_")
