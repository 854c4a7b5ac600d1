"""How much an error at a layer's output costs at the network's output, to second order and without labels.

The cost is the divergence from the outputs that the network has (numerics/divergence.py). Its second derivative there
is the Fisher matrix of the softened outputs, which is estimated by drawing classes from them (Martens, "New insights
and perspectives on the natural gradient method", arXiv:1412.1193); the factors per channel are those of KFAC for
convolutions, errors at different places taken as independent (Grosse and Martens, arXiv:1602.01407).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tersenet.numerics.divergence import TEMPERATURE
from tersenet.numerics.outputs import floats
from tersenet.numerics.samples import Inputs, in_parts, side_by_side

_BATCH = 64
# Of the largest of a layer: a channel that no drawn class spoke of may matter all the same.
_FLOOR = 1e-4


def output_sensitivities(graph: fx.GraphModule, calls: Mapping[fx.Node, str], images: Inputs) -> dict[str, Tensor]:
    """path -> (O,) d such that errors e of a layer's outputs (before its norm) cost about sum d mean(e^2) / 2.

    Args:
        graph: of a network in evaluation mode; its outputs are logits.
        calls: node -> path of the layers.
        images: (N, ...), or a tuple of all inputs.
    Cost: a forward and a backward pass.
    """
    source = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for batch in in_parts(images, _BATCH):
        given: dict[str, Tensor] = {}

        class Watch(fx.Interpreter):
            def run_node(self, node: fx.Node) -> Any:
                value = super().run_node(node)
                if node in calls:
                    # The first layers read what needs no gradient.
                    value = value if value.requires_grad else value.detach().requires_grad_()
                    given[calls[node]] = value  # noqa: B023
                return value

        with torch.enable_grad():
            outputs = Watch(graph).run(*batch)
            total = torch.zeros(())
            for each in floats(outputs):  # every output is a distribution of its own, as in numerics/divergence.py
                logs = torch.log_softmax(each.reshape(len(batch[0]), -1).float() / TEMPERATURE, dim=1)
                drawn = torch.multinomial(logs.detach().cpu().exp(), 1, generator=source).to(logs.device)
                # A softened divergence is worth temperature^2 times its nats, so a gradient temperature times.
                total = total.to(logs.device) + TEMPERATURE * logs.gather(1, drawn).sum()
            gradients = torch.autograd.grad(total, list(given.values()), allow_unused=True)
        for path, gradient in zip(given, gradients, strict=True):
            if gradient is None:
                continue
            squares = gradient.double().square()
            channels = squares.flatten(0, -2) if _last(graph, path) else squares.movedim(1, -1).flatten(0, -2)
            found[path] = found.get(path, 0.0) + channels.sum(dim=0) / len(side_by_side(images)[0])
    return {path: value.clamp(min=_FLOOR * float(value.max()) or 1e-12) for path, value in found.items()}


def _last(graph: fx.GraphModule, path: str) -> bool:
    """Whether a layer's channels are the last dimension of what it gives."""
    return isinstance(graph.get_submodule(path), torch.nn.Linear)
