"""Masked layers as least-squares problems: what each reads, which weights matter there, and the best of what stays.

Optimal brain surgeon on each layer's own output (Frantar and Alistarh, arXiv:2208.11580), in one pass over the graph
with all calibration images at once: a layer is fitted to what it gave before the masks were chosen, from what the
layers before it give now. Batch norms on the way follow what their input's mean and variance do, relative to what they
were, so that statistics of other data than the calibration images stay. The result does not depend on chance. Cost: two
forwards of the images and the least squares, a ResNet-18 at 224x224 and 64 images 110 seconds of one core in all.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersenet.bricks.evaluating import evaluating
from tersenet.bricks.mask import mask_of, stored_weight
from tersenet.graph import rows
from tersenet.graph.outside_reads import read_by_graph
from tersenet.graph.trace import trace
from tersenet.numerics import saliency
from tersenet.numerics.masked_squares import masked_least_squares
from tersenet.numerics.samples import first
from tersenet.pruning.sound import Soundness
from tersenet.task import Task

_RIDGE = 1e-4
_ROWS = 2048  # whose products are taken in float32, which is several times faster, and summed in float64
# Rounds of the least squares: as many multiply-adds as these buy a layer, but never fewer or more rounds than this.
_WORK, _LEAST, _MOST = 3e11, 20, 200


class Refit:
    """Remembers what layers give; `run` moves their weights, once the masks are chosen, to where they give it again.

    Args:
        paths: of masked layers. Convolutions of two dimensions and linear layers that are called once, and of whose
            numbers nobody else reads, are served; the others stay as they are.
        samples: how many calibration images, fewer where they would not fit in memory.
    Raises:
        DataError: without calibration data.
    """

    def __init__(self, model: nn.Module, paths: Collection[str], task: Task, samples: int) -> None:
        self.model, images = model, task.inputs_like(model, samples)
        self.graph = trace(model, first(images, 2))
        self.images = first(images, rows.fitting(self.graph))
        self.samples = len(self.images[0])
        self.calls = _calls(self.graph, set(paths) - set(read_by_graph(self.graph)))
        self.targets: dict[str, Tensor] = {}  # path -> (R, O), without the bias
        self.norms: dict[fx.Node, tuple[Tensor, Tensor]] = {}  # mean and variance of what they read
        with evaluating(model), torch.no_grad():
            self.sound = Soundness(model, self.images)
            _Remember(self).run(*self.images)

    def run(self) -> bool:
        """Changes the weights, biases and norm statistics of the model; whether it did: where its outputs blow up, all
        is put back (pruning/sound.py)."""
        with evaluating(self.model), torch.no_grad():
            return self.sound.kept(self.model, lambda: _Fit(self).run(*self.images))


class _Remember(fx.Interpreter):
    def __init__(self, job: Refit) -> None:
        super().__init__(job.graph)
        self.job = job

    def run_node(self, node: fx.Node) -> Any:
        path = self.job.calls.get(node)
        if path is not None:
            layer: Any = self.module.get_submodule(path)
            inputs = _inputs(self.env[node.args[0]], node, layer, self.job.samples)  # type: ignore[index]
            self.job.targets[path] = _given(inputs, layer)
        elif node.op == "call_module" and _has_statistics(self.module.get_submodule(str(node.target))):
            self.job.norms[node] = _moments(self.env[node.args[0]])  # type: ignore[index]
        return super().run_node(node)


class _Fit(fx.Interpreter):
    def __init__(self, job: Refit) -> None:
        super().__init__(job.graph)
        self.job, self.changed = job, False

    def run_node(self, node: fx.Node) -> Any:
        path = self.job.calls.get(node)
        if node.op == "call_module" and isinstance(node.args[0], fx.Node):
            layer: Any = self.module.get_submodule(str(node.target))
            value = self.env[node.args[0]]
            if path is not None:
                target = self.job.targets.pop(path)
                _fit(layer, _inputs(value, node, layer, self.job.samples), target, _norm_behind(self.job, node))
                self.changed = True
            elif self.changed and node in self.job.norms:
                (mean, variance), (was_mean, was_variance) = _moments(value), self.job.norms.pop(node)
                layer.running_mean.add_(mean - was_mean)
                # A channel that said nothing has no variance to compare with.
                layer.running_var.mul_(torch.where(was_variance > 0, variance / was_variance, 1.0))
        return super().run_node(node)


def _fit(layer: Any, inputs: Tensor, target: Tensor, norm: bool) -> None:
    """Puts the least-squares weight under the layer's mask, and the mean that it misses into the bias.

    Args:
        inputs: (R, G I K), G groups.
        target: (R, O).
        norm: whether a batch norm takes care of the mean.
    """
    groups = getattr(layer, "groups", 1)
    mask = mask_of(layer)
    assert mask is not None
    weight = stored_weight(layer)
    centred = norm or layer.bias is not None
    mean, offset = (each.double().mean(dim=0) * centred for each in (inputs, target))
    parts = zip(
        inputs.chunk(groups, dim=1), mean.chunk(groups), target.chunk(groups, dim=1), offset.chunk(groups),
        weight.flatten(1).chunk(groups), mask.mask.flatten(1).chunk(groups), strict=True,
    )  # fmt: skip
    fitted = torch.cat(
        [
            masked_least_squares(*_products(x, middle, t, centre), old, stays, _RIDGE, _rounds(old))
            for x, middle, t, centre, old, stays in parts
        ]
    )
    weight.copy_(torch.where(mask.mask, fitted.view_as(weight), weight))
    if layer.bias is not None:
        given = torch.cat(
            [new.double() @ part for new, part in zip(fitted.chunk(groups), mean.chunk(groups), strict=True)]
        )
        layer.bias.add_((offset - given).to(layer.bias.dtype))


def _products(inputs: Tensor, mean: Tensor, target: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """x x' (I, I) and t x' (O, I), summed over the rows of (R, I) and (R, O), around their means."""
    width = len(mean)
    gram = torch.zeros(width, width, dtype=torch.float64, device=inputs.device)
    cross = torch.zeros(len(offset), width, dtype=torch.float64, device=inputs.device)
    for x, t in zip(inputs.split(_ROWS), target.split(_ROWS), strict=True):
        x, t = x - mean.to(x.dtype), t - offset.to(t.dtype)
        gram += (x.T @ x).double()
        cross += (t.T @ x).double()
    return gram, cross


def _rounds(weight: Tensor) -> int:
    """How many rounds of the least squares a weight (O, I) gets; each lowers the error."""
    return int(min(max(_WORK / (weight.numel() * weight.shape[1]), _LEAST), _MOST))


def surgeon_scores(model: nn.Module, paths: Collection[str], task: Task, samples: int) -> dict[str, Tensor]:
    """Path -> what losing each weight alone costs once the others make up for it, as a share of the output's energy.

    Layers that cannot be read (transposed, called twice) count by their squared weights, as shares of the sum.
    """
    images = task.inputs_like(model, samples)
    graph = trace(model, first(images, 2))
    images = first(images, rows.fitting(graph))
    calls = _calls(graph, paths)
    scores: dict[str, Tensor] = {}

    class Look(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            path = calls.get(node)
            if path is not None:
                layer: Any = graph.get_submodule(path)
                inputs = _inputs(self.env[node.args[0]], node, layer, len(images[0]))  # type: ignore[index]
                scores[path] = _surgeon(layer, inputs.double())
            return super().run_node(node)

    with evaluating(model), torch.no_grad():
        Look(graph).run(*images)
    for path in paths:
        if path not in scores:
            squares = saliency.l2(model.get_submodule(path).weight)  # type: ignore[arg-type]
            scores[path] = squares / squares.sum().clamp(min=1e-300)
    return scores


def _surgeon(layer: Any, inputs: Tensor) -> Tensor:
    """(R, G I K) -> float64 of the weight's shape."""
    groups = getattr(layer, "groups", 1)
    found = []
    weight = layer.weight.double().flatten(1)
    energy = 0.0
    for part, rows_ in zip(inputs.chunk(groups, dim=1), weight.chunk(groups), strict=True):
        gram = part.T @ part
        energy += float((rows_ @ gram * rows_).sum())
        gram.diagonal().add_(_RIDGE * float(gram.diagonal().mean()) or 1.0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram)).diagonal()
        found.append(saliency.obs(rows_, inverse.expand_as(rows_)))
    return (torch.cat(found) / max(energy, 1e-300)).view(layer.weight.shape)


def _calls(graph: fx.GraphModule, paths: Collection[str]) -> dict[fx.Node, str]:
    """node -> path of the wanted layers that are called once and compute what their weight says."""
    nodes: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and str(node.target) in paths and _readable(graph.get_submodule(str(node.target))):
            nodes.setdefault(str(node.target), []).append(node)
    return {calls[0]: path for path, calls in nodes.items() if len(calls) == 1}


def _readable(layer: Any) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def _inputs(value: Tensor, node: fx.Node, layer: Any, images: int) -> Tensor:
    """(R, G I K): what the layer reads at sampled positions, the same for every image."""
    return rows.read(value, layer, rows.places(node, layer, images))


def _given(inputs: Tensor, layer: Any) -> Tensor:
    """(R, G I K) -> (R, O), without the bias."""
    groups = getattr(layer, "groups", 1)
    weights = layer.weight.flatten(1).chunk(groups)
    return torch.cat([part @ new.T for part, new in zip(inputs.chunk(groups, dim=1), weights, strict=True)], dim=1)


def _norm_behind(job: Refit, node: fx.Node) -> bool:
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user is not None and user.op == "call_module" and _has_statistics(job.graph.get_submodule(str(user.target)))


def _moments(value: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of (N, C, ...) for each channel."""
    found = value.movedim(1, 0).flatten(1)
    return found.mean(dim=1), found.var(dim=1)


def _has_statistics(module: Any) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
