"""Repairs a network after a cut, without training: least squares, layer by layer, on what each layer reads now.

One pass over the graph with all calibration images at once. Each layer that lost inputs, or that reads what changed, is
refitted to what it gave before the cut (He et al., arXiv:1707.06168), together with the batch norm behind it, and then
the pass goes on, so every layer sees what the repaired layers before it give. Where the output goes into a residual
addition, the target is the original sum without the shortcut as it is now: a block makes up for the errors of the
blocks before it, dropped ones included. Of a masked layer only what is there is fitted. The result does not depend on
chance. Departures: nothing is drawn to zero but to the weights that are there, and the sampled positions are the same
for every image.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersenet.bricks.evaluating import evaluating
from tersenet.bricks.mask import mask_of, stored_weight
from tersenet.graph import rows
from tersenet.graph.surgery import Cut
from tersenet.graph.trace import trace
from tersenet.numerics.compensation import least_squares
from tersenet.numerics.masked_squares import masked_least_squares
from tersenet.numerics.samples import Inputs, first
from tersenet.pruning.sound import Soundness

aten = torch.ops.aten
_ADDITIONS = (operator.add, operator.iadd, aten.add.Tensor, aten.add_.Tensor)


def repair(
    model: nn.Module, images: Inputs, before: nn.Module | None, kept: Cut, sequential: bool = True, ridge: float = 1e-3
) -> bool:
    """Changes weights, biases and norms of a cut model, in place; where its outputs blow up, all is put back.

    Args:
        images: (N, ...), or a tuple of all inputs; as many of them are used as fit in memory.
        before: the model before the cut; None measures the norms only.
        kept: the cut. Blocks that were dropped need not be in it.
        sequential: also refit layers that lost no inputs but read what changed, where there are four rows per unknown.
        ridge: of the least squares; more stays closer to the weights that are there.
    Returns:
        Whether the model was changed: False where it was put back.
    """
    graph = trace(model, first(images, 2))
    images = first(images, rows.fitting(graph))
    with contextlib.ExitStack() as stack:
        for root in (model, before):
            if root is not None:
                stack.enter_context(evaluating(root))
        with torch.no_grad():
            jobs = {} if before is None else _jobs(graph, before, images, kept, sequential)
            poorer = {path for path in kept if "in" in kept[path]}
            dropped = before is not None and _layers(before) != _layers(model)
            passing = _Pass(graph, jobs, poorer, ridge, dropped or not poorer)
            return Soundness(before, images).kept(model, lambda: passing.run(*images))


def _layers(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if rows.is_plain(module, masked=True)}


@dataclass
class _End:
    """Where the output of a layer ends up.

    Args:
        norm: the batch norm that alone reads it, if there is one.
        last: the node of the norm, else of the layer.
        sum: the residual addition that alone reads that, if there is one.
        shortcut: what is added there.
    """

    norm: fx.Node | None
    last: fx.Node
    sum: fx.Node | None = None
    shortcut: fx.Node | None = None


def _end(graph: fx.GraphModule, node: fx.Node) -> _End:
    user = next(iter(node.users)) if len(node.users) == 1 else None
    followed = user is not None and user.op == "call_module" and _has_statistics(graph.get_submodule(str(user.target)))
    end = _End(user, user) if followed and user is not None else _End(None, node)
    reader = next(iter(end.last.users)) if len(end.last.users) == 1 else None
    if reader is None or reader.op != "call_function" or reader.target not in _ADDITIONS or reader.kwargs:
        return end
    others = [arg for arg in reader.args if arg is not end.last]
    if len(others) == 1 and isinstance(others[0], fx.Node) and others[0].meta.get("shape") == end.last.meta["shape"]:
        end.sum, end.shortcut = reader, others[0]
    return end


@dataclass
class _Job:
    """A layer to refit.

    Args:
        end: where its output goes, in the cut graph.
        places: (P,) sampled positions.
        own: (R, O) what the layer, with its norm, gave before the cut.
        sum: (R, O) what the residual addition gave.
    """

    end: _End
    places: Tensor
    own: Tensor | None = None
    sum: Tensor | None = None


def _jobs(
    graph: fx.GraphModule, before: nn.Module, images: tuple[Tensor, ...], kept: Cut, sequential: bool
) -> dict[str, _Job]:
    """path -> job, with what the original gave at the places."""
    whole = trace(before, first(images, 2))
    original = rows.plain_calls(whole, masked=True)
    jobs: dict[str, _Job] = {}
    wanted: dict[fx.Node, list[tuple[str, str]]] = {}
    for path, node in rows.plain_calls(graph, masked=True).items():
        module: Any = graph.get_submodule(path)
        chosen = rows.places(node, module, len(images[0]))
        poorer = "in" in kept.get(path, {})
        enough = len(chosen) * len(images[0]) >= 4 * module.weight[0].numel()
        if path not in original or not (poorer or (sequential and enough)):
            continue
        end, then = _end(graph, node), _end(whole, original[path])
        jobs[path] = _Job(end, chosen)
        wanted.setdefault(then.last, []).append((path, "own"))
        if end.sum is not None and then.sum is not None:
            wanted.setdefault(then.sum, []).append((path, "sum"))

    class Record(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            for path, name in wanted.get(node, ()):
                module = whole.get_submodule(path)
                found = rows.given(value, module, jobs[path].places)
                outputs = _outputs(module, kept.get(path, {}))
                found = found.clone() if outputs is None else found[:, outputs.to(found.device)]
                setattr(jobs[path], name, found)
            return value

    Record(whole).run(*images)
    return jobs


def _outputs(module: Any, roles: Mapping[str, Sequence[int]]) -> Tensor | None:
    """Which outputs a layer keeps; None for all. Of a depthwise layer each channel gives one or several."""
    if "out" in roles:
        return torch.tensor(roles["out"])
    if "channel" not in roles:
        return None
    times = module.out_channels // module.groups
    return (torch.tensor(roles["channel"])[:, None] * times + torch.arange(times)).flatten()


class _Pass(fx.Interpreter):
    """Runs the cut model node by node and repairs each layer before it runs."""

    def __init__(
        self, graph: fx.GraphModule, jobs: dict[str, _Job], poorer: set[str], ridge: float, changed: bool
    ) -> None:
        super().__init__(graph)
        self.jobs, self.poorer, self.ridge = jobs, poorer, ridge
        # What comes before the first layer that lost inputs gives what it gave, and stays as training left it.
        self.changed = changed
        self.done: set[str] = set()

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "call_module":
            path = str(node.target)
            module, value = self.module.get_submodule(path), self.env[node.args[0]]  # type: ignore[index]
            self.changed = self.changed or path in self.poorer
            job = self.jobs.pop(path, None)
            if job is not None and self.changed:
                self._refit(module, value, job)
            elif self.changed and _has_statistics(module) and path not in self.done:
                _measure(module, value)
        return super().run_node(node)

    def _refit(self, module: Any, value: Tensor, job: _Job) -> None:
        target = job.own
        if job.sum is not None and job.end.shortcut in self.env:
            target = job.sum - rows.given(self.env[job.end.shortcut], module, job.places)
        assert target is not None
        norm = None
        if job.end.norm is not None:
            norm = self.module.get_submodule(str(job.end.norm.target))
            self.done.add(str(job.end.norm.target))
        refit(module, norm, rows.read(value, module, job.places), target, self.ridge)


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


def _measure(norm: Any, value: Tensor) -> None:
    """Mean and variance of (N, C, ...), over all images at once."""
    found = value.movedim(1, 0).flatten(1)
    norm.running_mean.copy_(found.mean(dim=1))
    norm.running_var.copy_(found.var(dim=1))


def refit(module: Any, norm: Any, inputs: Tensor, target: Tensor, ridge: float) -> None:
    """Puts the least-squares weight, and bias where there is one, into a layer and the batch norm behind it.

    The norm's statistics become those of what the layer gives now, and its scale and shift follow, so that it computes
    the same whether it evaluates or trains.

    Args:
        inputs: (R, G I K), G groups.
        target: (R, O), behind the norm.
    """
    groups = getattr(module, "groups", 1)
    factor = torch.ones(target.shape[1], dtype=torch.float64, device=target.device)
    if norm is not None:
        factor = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            factor = factor * norm.weight.double()
            # A scale of almost nothing could not be divided by.
            factor = torch.where(factor.abs() > 1e-4 * factor.abs().max(), factor, 1.0)
    centred = norm is not None or module.bias is not None
    target = target.double()
    offset = target.mean(dim=0) * centred
    average = inputs.mean(dim=0, dtype=torch.float64) * centred
    scale = factor.reshape(-1, *(1,) * (module.weight.dim() - 1))
    prior = (module.weight.double() * scale).flatten(1)
    mask = mask_of(module)
    stays = [None] * groups if mask is None else mask.mask.flatten(1).chunk(groups)
    weight = torch.cat(
        [
            _solved(part.double() - mean, wanted, old, ridge, there)
            for part, mean, wanted, old, there in zip(
                inputs.chunk(groups, dim=1), average.chunk(groups), (target - offset).chunk(groups, dim=1),
                prior.chunk(groups), stays, strict=True,
            )
        ]
    )  # fmt: skip
    stored = stored_weight(module)
    found = weight.view_as(stored) / scale
    stored.copy_(found if mask is None else torch.where(mask.mask, found, stored))
    shift = torch.cat(
        [new @ mean for new, mean in zip(weight.chunk(groups), average.chunk(groups), strict=True)]
    )  # (O,) the mean of what the layer gives behind the norm's scale
    if norm is None:
        if module.bias is not None:
            module.bias.copy_(offset - shift)
        return
    _follow(norm, module, inputs, factor, shift / factor, offset, groups)


def _solved(inputs: Tensor, target: Tensor, prior: Tensor, ridge: float, stays: Tensor | None) -> Tensor:
    """(O, I) the least-squares weight, zero where a mask says so."""
    if stays is None:
        return least_squares(inputs, target, prior, ridge)
    return masked_least_squares(inputs.T @ inputs, target.T @ inputs, prior, stays, ridge)


def _follow(norm: Any, module: Any, inputs: Tensor, factor: Tensor, mean: Tensor, offset: Tensor, groups: int) -> None:
    """Sets a norm so that it gives factor * (z - mean) + offset of what the layer gives, z."""
    bias = 0.0 if module.bias is None else module.bias.double()
    if norm.weight is None or norm.bias is None:  # its scale and shift are fixed, which leaves the mean
        norm.running_mean.copy_(mean + bias - offset * torch.sqrt(norm.running_var.double() + norm.eps))
        return
    flat = module.weight.flatten(1)
    variance = torch.cat(
        [(part @ new.T).var(dim=0) for part, new in zip(inputs.chunk(groups, dim=1), flat.chunk(groups), strict=True)]
    )
    norm.running_mean.copy_(mean + bias)
    norm.running_var.copy_(variance)
    norm.weight.copy_(factor * torch.sqrt(variance.double() + norm.eps))
    norm.bias.copy_(offset)
