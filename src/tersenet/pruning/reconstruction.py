"""What the layers that read a bundle of channels lose without some of them, after making up for them as best they can.

The measure is the second-order one of numerics/elimination.py (ZipLM, Kurtic et al., arXiv:2302.04089), on the inputs
that the layers read in the uncut model. Norms are folded into the layers first, so that errors are counted as they
reach the rest of the network. Used for choosing channels, and for how much each width of each bundle hurts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from tersenet.graph import rows
from tersenet.graph.coupling import Bundle, Coupling
from tersenet.graph.fold import fold_all
from tersenet.graph.trace import trace
from tersenet.numerics.elimination import Elimination, Reader, eliminate
from tersenet.numerics.samples import Inputs, in_parts, side_by_side
from tersenet.pruning.importance import reduced, share


def folded(model: nn.Module, example: Inputs) -> fx.GraphModule:
    """A copy of a model, in evaluation mode, whose norms are part of the layers before them; paths stay."""
    graph = trace(copy.deepcopy(model).eval(), example)
    fold_all(graph)
    return graph.eval()


def reading(known: Coupling, bundle: Bundle, plain: dict[str, fx.Node]) -> list[str] | None:
    """Paths of the layers that read a bundle, when losing its channels is the same as reading zeros; else None.

    Not so where a norm mixes channels, and where a reader is no plain layer that is called once.
    """
    modules = {path: known.graph.get_submodule(path) for path, _ in bundle.members}
    for path, role in bundle.members:
        if role == "channel" and not _is_per_channel(modules[path]):
            return None
    readers = [path for path, role in bundle.members if role == "in"]
    if not readers or any(path not in plain or getattr(modules[path], "groups", 1) > 1 for path in readers):
        return None
    return readers


def _is_per_channel(module: Any) -> bool:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.running_mean is not None
    return isinstance(module, nn.PReLU) or hasattr(module, "kernel_size")


def read_grams(twin: fx.GraphModule, paths: set[str], images: Inputs, batch: int = 128) -> dict[str, Tensor]:
    """path -> (I K K, I K K) mean of x x' over sampled positions of some layers' inputs, float64."""
    plain = {path: node for path, node in rows.plain_calls(twin).items() if path in paths}
    samples, device = len(side_by_side(images)[0]), side_by_side(images)[0].device
    chosen = {path: rows.places(node, twin.get_submodule(path), samples) for path, node in plain.items()}
    sums: dict[str, Tensor] = {}

    class Record(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            path = str(node.target)
            if node.op == "call_module" and path in plain:
                module = twin.get_submodule(path)
                found = rows.read(self.env[node.args[0]], module, chosen[path])  # type: ignore[index]
                sums[path] = sums.get(path, 0.0) + (found.T @ found).double()
            return super().run_node(node)

    with torch.no_grad():
        for number, part in enumerate(in_parts(images, batch)):
            if share(number):
                Record(twin).run(*part)
    for path in plain:
        if path not in sums:  # a process without images
            size = twin.get_submodule(path).weight[0].numel()  # type: ignore[index]
            sums[path] = torch.zeros(size, size, dtype=torch.float64, device=device)
        reduced(sums[path])
    return {path: total / (len(chosen[path]) * samples) for path, total in sums.items()}


def bundle_readers(
    known: Coupling, bundle: Bundle, paths: list[str], twin: fx.GraphModule, grams: dict[str, Tensor]
) -> list[Reader]:
    """The layers that read a bundle as linear maps; the bundle's i-th class is channel i."""
    found = []
    for path in paths:
        weight: Any = twin.get_submodule(path).weight
        classes = known.slots[path, "in"]
        kernel = weight[0, 0].numel()
        places = [np.flatnonzero(classes == own) for own in bundle.classes]
        inner = torch.arange(kernel)
        groups = torch.stack([(torch.from_numpy(own)[:, None] * kernel + inner).flatten() for own in places])
        found.append(Reader(grams[path], weight.flatten(1), groups.to(weight.device)))
    return found


@dataclass(frozen=True)
class Losses:
    """What a bundle's readers lose.

    Args:
        readers: their paths.
        first: the first of them in the twin's graph.
        found: order, errors and weights; channel i is the bundle's i-th class.
    """

    readers: list[str]
    first: fx.Node
    found: Elimination


def losses(
    known: Coupling,
    bundles: Sequence[Bundle],
    twin: fx.GraphModule,
    images: Inputs,
    keep: Sequence[Sequence[int]] | None = None,
    orders: Sequence[Sequence[int] | None] | None = None,
) -> list[Losses | None]:
    """Eliminates the channels of each bundle alone; None where its readers cannot make up for them.

    Args:
        twin: of `folded`.
        images: (N, ...) for the Gram matrices.
        keep: per bundle, the numbers of channels for which the readers' weights are wanted.
        orders: per bundle, the order to remove channels in; None finds the best.
    """
    plain = rows.plain_calls(twin)
    places = {node: i for i, node in enumerate(twin.graph.nodes)}
    result: list[Losses | None] = []
    for i, maps in enumerate(readers_of(known, bundles, twin, images)):
        if maps is None:
            result.append(None)
            continue
        found = eliminate(list(maps.values()), keep[i] if keep else (), orders[i] if orders else None)
        result.append(Losses(list(maps), min((plain[path] for path in maps), key=lambda node: places[node]), found))
    return result


def readers_of(
    known: Coupling, bundles: Sequence[Bundle], twin: fx.GraphModule, images: Inputs
) -> list[dict[str, Reader] | None]:
    """Per bundle, path -> the layer that reads it as a linear map; None where its readers cannot make up for a loss."""
    plain = rows.plain_calls(twin)
    paths = [reading(known, bundle, plain) for bundle in bundles]
    grams = read_grams(twin, {path for found in paths for path in found or ()}, images)
    return [
        None if found is None else dict(zip(found, bundle_readers(known, bundle, found, twin, grams), strict=True))
        for bundle, found in zip(bundles, paths, strict=True)
    ]
