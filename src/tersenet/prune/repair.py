"""Repairs a network after a cut, without training: least squares where inputs were lost, fresh norm statistics.

One pass over the graph with all calibration images at once: each layer that lost inputs is refitted to what it gave
before the cut, on the inputs it gets now (He et al., arXiv:1707.06168), then the norm behind it is measured anew, then
the pass goes on. So every layer sees what the repaired layers before it give, and the result does not depend on order
or chance. Departures: nothing is drawn to zero, the sampled positions are the same for every image, and where a norm
follows, the mean is left to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tersenet.graph.surgery import Cut
from tersenet.graph.trace import trace
from tersenet.numerics.compensation import least_squares

# An activation of all images together, or the rows of one least-squares problem: 2^26 floats are 256 MiB.
_FLOATS = 2**26
_ROWS = 2**13  # and at least four times the unknowns


def repair(model: nn.Module, images: Tensor, before: nn.Module | None, kept: Cut) -> None:
    """Changes weights, biases and norm statistics of a cut model, in place.

    Args:
        images: (N, ...); as many of them are used as fit in memory.
        before: the model before the cut; None measures the norms only.
        kept: the cut.
    """
    graph = trace(model, images[:2])
    largest = max((_size(node) for node in graph.graph.nodes), default=1) // len(images[:2])
    images = images[: max(8, _FLOATS // max(1, largest))]
    modes = [(module, module.training) for root in (model, before) if root is not None for module in root.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with torch.no_grad():
            places = {} if before is None else _places(graph, kept, len(images))
            targets = {} if before is None else _targets(before, images, kept, places)
            _Pass(graph, targets, places, {path for path in kept if "in" in kept[path]}).run(images)
    finally:
        for module, training in modes:
            module.training = training


def _size(node: fx.Node) -> int:
    size = 1
    for length in node.meta.get("shape", ()):
        size *= length
    return size


def _places(graph: fx.GraphModule, kept: Cut, images: int) -> dict[str, Tensor]:
    """path -> positions of the output that take part, for the plain layers that lost inputs and are called once.

    Enough for four rows per unknown, or all there are. Images differ more than positions of one image, so all images
    take part and share their positions.
    """
    nodes: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            nodes.setdefault(str(node.target), []).append(node)
    found = {}
    for path, calls in nodes.items():
        module: Any = graph.get_submodule(path)
        if "in" not in kept.get(path, {}) or len(calls) > 1 or not _is_plain(module):
            continue
        shape = calls[0].meta["shape"]
        unknowns = module.weight[0].numel()
        rows = min(max(_ROWS, 4 * unknowns), _FLOATS // unknowns)
        count = _size(calls[0]) // shape[0] // module.weight.shape[0]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        chosen = order[: max(1, -(-rows // images))].sort().values
        found[path] = chosen.to(module.weight.device)
    return found


def _is_plain(module: nn.Module) -> bool:
    """Bricks and parametrized layers compute something else than their weight says."""
    if type(module) is nn.Conv2d:
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def _rows(output: Tensor, linear: bool, places: Tensor) -> Tensor:
    """(N, O, H, W) or (N, ..., O) -> (R, O), R = N times the number of places."""
    if not linear:
        output = output.movedim(1, -1)
    return output.flatten(1, -2)[:, places].flatten(0, 1) if output.dim() > 2 else output


def _targets(before: nn.Module, images: Tensor, kept: Cut, places: dict[str, Tensor]) -> dict[str, Tensor]:
    """path -> (R, O) what the layer gave before the cut, for the outputs that it still has."""
    targets: dict[str, Tensor] = {}
    hooks = []
    for path, chosen in places.items():

        def keep(module: nn.Module, inputs: Any, output: Tensor, path: str = path, chosen: Tensor = chosen) -> None:
            rows = _rows(output, isinstance(module, nn.Linear), chosen)
            outputs = kept[path].get("out")
            targets[path] = rows if outputs is None else rows[:, torch.tensor(outputs, device=rows.device)]

        hooks.append(before.get_submodule(path).register_forward_hook(keep))
    try:
        before(images)
    finally:
        for hook in hooks:
            hook.remove()
    return targets


class _Pass(fx.Interpreter):
    """Runs the cut model node by node and repairs each layer before it runs."""

    def __init__(
        self, graph: fx.GraphModule, targets: dict[str, Tensor], places: dict[str, Tensor], poorer: set[str]
    ) -> None:
        super().__init__(graph)
        self.targets, self.places, self.poorer = targets, places, poorer
        # Norms in front of the first layer that lost inputs see what they saw in training, which measured them better.
        self.changed = not poorer

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "call_module":
            module, value = self.module.get_submodule(str(node.target)), self.env[node.args[0]]  # type: ignore[index]
            path = str(node.target)
            if path in self.targets:
                followed = all(
                    user.op == "call_module" and _has_statistics(self.module.get_submodule(str(user.target)))
                    for user in node.users
                )
                _refit(module, value, self.targets.pop(path), self.places[path], followed)
            elif self.changed and _has_statistics(module):
                _measure(module, value)
            self.changed = self.changed or path in self.poorer
        return super().run_node(node)


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


def _measure(norm: Any, value: Tensor) -> None:
    """Mean and variance of (N, C, ...), over all images at once."""
    rows = value.movedim(1, 0).flatten(1)
    norm.running_mean.copy_(rows.mean(dim=1))
    norm.running_var.copy_(rows.var(dim=1))


def _refit(module: Any, value: Tensor, target: Tensor, places: Tensor, followed: bool) -> None:
    """Puts the least-squares weight, and bias where there is one, into a layer.

    Args:
        value: (N, I, H, W) or (N, ..., I), what the layer reads now.
        target: (R, O).
        followed: a norm comes next and takes care of the mean.
    """
    if isinstance(module, nn.Linear):
        rows, groups = _rows(value, True, places), 1
    else:
        rows, groups = _patches(module, value, places), module.groups
    target = target.to(torch.float64)
    centred = followed or module.bias is not None
    mean = target.mean(dim=0)
    weights, shifts = [], []
    # (R, G I K) -> G times (R, I K), and (R, G O) -> G times (R, O)
    for part, wanted, weight in zip(
        rows.chunk(groups, dim=1), target.chunk(groups, dim=1), module.weight.chunk(groups), strict=True
    ):
        part = part.double()
        average = part.mean(dim=0) * centred
        offset = wanted.mean(dim=0) * centred
        found = least_squares(part - average, wanted - offset, weight.flatten(1))
        weights.append(found.view_as(weight))
        shifts.append(found.double() @ average)
    module.weight.copy_(torch.cat(weights))
    if module.bias is not None:
        module.bias.copy_(mean - torch.cat(shifts))


def _patches(module: Any, value: Tensor, places: Tensor) -> Tensor:
    """(N, I, H, W) -> (R, I K K): what the kernel sees at the places, a few images at a time."""
    step = max(1, _FLOATS // 4 // max(1, value[0].numel() * module.kernel_size[0] * module.kernel_size[1]))
    found = [
        F.unfold(part, module.kernel_size, module.dilation, module.padding, module.stride)[:, :, places]
        for part in value.split(step)
    ]
    return torch.cat(found).transpose(1, 2).flatten(0, 1)
