"""What importances read off data: activations, and gradients of the loss for channels and for single weights.

One pass over the data each, in evaluation mode, remembered while the model stays as it is. Gradients need a loss: the
task's own on its training data; without that, labels are drawn from the model's own predictions on the calibration
data, which gives the true Fisher information in place of the empirical one (Kunstner et al., arXiv:1905.12558).

With several processes (torch.distributed) every process reads all batches and works on its share of them; sums are
reduced, so that all of them know the same, and the same as one process would.

A channel's gradient is that of a gate, a factor of 1 on the channel where other layers read it (Molchanov et al.,
arXiv:1906.10771): d loss / d gate = sum over positions of activation times gradient, the first-order change of the loss
when the channel becomes zero. The loss must be a mean over samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.bricks.evaluating import evaluating
from tersenet.errors import DataError
from tersenet.graph.coupling import Coupling
from tersenet.pruning.known import numbers_of, remembered, structure_of
from tersenet.task import Task, batch_input, batches_at, samples_in, to_device
from tersenet.train.batches import split

SAMPLES = 512
_GROUP = 8  # samples that share one backward for the gradients of weights
_CHUNK = 64  # samples that run together otherwise


@dataclass(frozen=True)
class Activations:
    """What layers read; those that are never called (whose weights the forward uses itself) are not in it.

    Args:
        size: path -> (I,) mean |activation| of each input channel or feature, float64.
        active: path -> (I,) share of activations that are not zero; APoZ (Hu et al., arXiv:1607.03250) is 1 minus it.
    """

    size: dict[str, np.ndarray]
    active: dict[str, np.ndarray]


@dataclass(frozen=True)
class Moments:
    """Of the gradients of one weight: mean |g| and mean g^2 over samples, in the weight's shape, float64."""

    size: Tensor
    square: Tensor


def reduced(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place; the tensor itself where there is one process."""
    if _world() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def share(index: int) -> bool:
    """Whether this process works on the piece of data with this number."""
    return _world() == 1 or index % _world() == torch.distributed.get_rank()


def _world() -> int:
    on = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if on else 1


def activations(model: nn.Module, task: Task, paths: Sequence[str], limit: int = SAMPLES) -> Activations:
    """Mean size and share of non-zeros of what some layers read, on about `limit` unlabelled samples."""
    key = (structure_of(model, task.example), numbers_of(model), _source(task)[0], limit, tuple(paths))
    return remembered(model, "activations", key, lambda: _activations(model, task, paths, limit))


def _activations(model: nn.Module, task: Task, paths: Sequence[str], limit: int) -> Activations:
    sums: dict[str, Tensor] = {}  # (3, I): sum of sizes, number of non-zeros, number of values

    def look(path: str, value: Tensor, dim: int) -> Tensor:
        rows = value.detach().movedim(dim, 0).flatten(1).double()
        found = torch.stack(
            [rows.abs().sum(1), rows.count_nonzero(1).double(), torch.full_like(rows[:, 0], rows.shape[1])]
        )
        sums[path] = sums[path] + found if path in sums else found
        return value

    with _reading(model, paths, look), torch.no_grad():
        for _, _, batch in _pieces(model, task, task.calibration(limit), _CHUNK):
            task.run(model, batch)
    for path in paths:  # in one order on every process; a process without samples has seen nothing
        if path not in sums:
            sums[path] = torch.zeros(3, _inputs(model.get_submodule(path)), dtype=torch.float64, device=_device(model))
        reduced(sums[path])
    called = {path: total.cpu().numpy() for path, total in sums.items() if total[2].all()}
    return Activations(
        {path: total[0] / total[2] for path, total in called.items()},
        {path: total[1] / total[2] for path, total in called.items()},
    )


def gate_gradients(model: nn.Module, task: Task, known: Coupling, limit: int = SAMPLES) -> np.ndarray:
    """(M, classes) gradient of each sample's loss by a gate on each class of channels, float64; M is about `limit`.

    A class is gated in all layers that read it at once. Classes that no layer reads have zeros.
    """
    key = (structure_of(model, task.example), numbers_of(model), _source(task), limit)
    return remembered(model, "gates", key, lambda: _gate_gradients(model, task, known, limit))


def _gate_gradients(model: nn.Module, task: Task, known: Coupling, limit: int) -> np.ndarray:
    paths = [path for (path, role), _ in known.slots.items() if role == "in"]
    owners = {path: torch.from_numpy(known.slots[path, "in"]).to(_device(model)) for path in paths}
    classes = 1 + max((int(vector.max(initial=0)) for vector in known.slots.values()), default=0)
    gates: list[tuple[str, Tensor]] = []

    def look(path: str, value: Tensor, dim: int) -> Tensor:
        shape = [1] * value.dim()
        shape[0], shape[dim] = value.shape[0], value.shape[dim]
        gate = torch.ones(shape, dtype=value.dtype, device=value.device, requires_grad=True)
        gates.append((path, gate))
        return value * gate

    parts: list[Tensor] = []
    with _reading(model, paths, look), torch.enable_grad():
        for own, count, batch in _pieces(model, task, _labelled(task, limit), _CHUNK, everyone=True):
            part = torch.zeros(count, classes, dtype=torch.float64, device=_device(model))
            if own is not None:
                gates.clear()
                loss = _loss(model, task, batch, own) * count
                found = torch.autograd.grad(loss, [gate for _, gate in gates], allow_unused=True)
                for (path, gate), gradient in zip(gates, found, strict=True):
                    if gradient is not None:
                        rows = _per_sample(gradient.double().reshape(len(gate), -1), count)
                        part.index_add_(1, owners[path], rows)
            parts.append(part)
    return reduced(torch.cat(parts)).cpu().numpy()


def _per_sample(rows: Tensor, count: int) -> Tensor:
    """(R, I) -> (count, I): windows of an image, one image after another, are added up.

    Where the first dimension is no multiple of the samples (sequences first), each gets the mean of all.
    """
    if len(rows) % count:
        return rows.sum(dim=0, keepdim=True).expand(count, -1) / count
    return rows.view(count, -1, rows.shape[1]).sum(dim=1)


def weight_gradients(model: nn.Module, task: Task, paths: Sequence[str], limit: int = SAMPLES) -> dict[str, Moments]:
    """Path of a layer -> moments of the gradients of its weight, on about `limit` samples.

    Eight samples share a backward. The variance of their mean is an eighth of a sample's, so mean g^2 is taken times
    eight and mean |g| times sqrt(8): right where the mean gradient is small against its spread, as in trained models.
    """
    key = (structure_of(model, task.example), numbers_of(model), _source(task), limit, tuple(paths))
    return remembered(model, "gradients", key, lambda: _weight_gradients(model, task, paths, limit))


def _weight_gradients(model: nn.Module, task: Task, paths: Sequence[str], limit: int) -> dict[str, Moments]:
    weights: list[Any] = [original_of(model.get_submodule(path)) for path in paths]
    sums = [torch.zeros(2, *weight.shape, dtype=torch.float64, device=weight.device) for weight in weights]
    total = 0
    with _evaluating(model, weights), torch.enable_grad():
        for own, count, batch in _pieces(model, task, _labelled(task, limit), _GROUP, everyone=True):
            total += count
            if own is None:
                continue
            found = torch.autograd.grad(_loss(model, task, batch, own), weights, allow_unused=True)
            for sum_, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    gradient = gradient.double() * count**0.5
                    sum_[0] += gradient.abs() * count
                    sum_[1] += gradient.square() * count
    means = [reduced(sum_) / max(1, total) for sum_ in sums]
    return {path: Moments(mean[0], mean[1]) for path, mean in zip(paths, means, strict=True)}


def original_of(layer: Any) -> Tensor:
    """The parameter behind a layer's weight: a mask or another parametrization keeps it under another name."""
    return layer.parametrizations.weight.original if hasattr(layer, "parametrizations") else layer.weight


# --- data and hooks ------------------------------------------------------------------------------------------------


def _source(task: Task) -> tuple[int, int]:
    return id(task.calibrate if task.calibrate is not None else task.train), id(task.train)


def _labelled(task: Task, limit: int) -> Iterator[Any]:
    """Batches of about `limit` samples for a loss: of the training data, else of the calibration data."""
    if task.train is None:
        yield from task.calibration(limit)
        return
    seen = 0
    for batch in batches_at(task.train, 0):
        if seen >= limit:
            break
        seen += samples_in(batch)
        yield batch
    if seen == 0:
        raise DataError("the training data is empty (0 samples); give at least one batch")


def _pieces(
    model: nn.Module, task: Task, batches: Iterator[Any], size: int, everyone: bool = False
) -> Iterator[tuple[int | None, int, Any]]:
    """(number of the piece, its samples, the piece) of at most `size` samples, of this process's share.

    Args:
        everyone: also the pieces of the other processes, without number.
    """
    number = 0
    for batch in batches:
        samples = samples_in(batch)
        pieces = -(-samples // size)
        for i in range(pieces):
            own = share(number)
            if own or everyone:
                piece = split(batch, samples, i, pieces)[0] if own else None
                count = len(range(i, samples, pieces))
                yield number if own else None, count, to_device(piece, _device(model))
            number += 1


def _loss(model: nn.Module, task: Task, batch: Any, number: int) -> Tensor:
    """The task's loss on a batch of training data; else with labels drawn from the outputs, the same on every run."""
    outputs = task.forward(model, batch)
    if task.train is not None:
        return task.loss(outputs, batch)
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        raise DataError(
            "the importance needs gradients of a loss, and labels can be drawn from logits (N, classes) only, got "
            f"{_shape(outputs)}; give labelled data as task.train"
        )
    mixed = int(np.random.SeedSequence([task.seed, number]).generate_state(1)[0])
    generator = torch.Generator().manual_seed(mixed)
    drawn = torch.multinomial(outputs.detach().softmax(dim=1).cpu(), 1, generator=generator)[:, 0]
    return task.loss(outputs, (batch_input(batch), drawn.to(outputs.device)))


def _shape(outputs: Any) -> str:
    return f"a tensor of {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__


@contextmanager
def _evaluating(model: nn.Module, wanted: Sequence[Tensor] = ()) -> Iterator[None]:
    """Evaluation mode, with gradients for these tensors; everything is put back."""
    before = [tensor.requires_grad for tensor in wanted]
    for tensor in wanted:
        tensor.requires_grad_(True)
    try:
        with evaluating(model):
            yield
    finally:
        for tensor, needed in zip(wanted, before, strict=True):
            tensor.requires_grad_(needed)


@contextmanager
def _reading(model: nn.Module, paths: Sequence[str], look: Any) -> Iterator[None]:
    """Calls look(path, value, dimension of the channels) on what layers read, and gives them what it returns."""
    handles = []
    for path in paths:
        module = model.get_submodule(path)

        def hook(layer: nn.Module, inputs: tuple[Any, ...], path: str = path) -> tuple[Any, ...]:
            dim = inputs[0].dim() - 1 if hasattr(layer, "in_features") else 1
            return (look(path, inputs[0], dim), *inputs[1:])

        handles.append(module.register_forward_pre_hook(hook))
    try:
        with _evaluating(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _inputs(layer: Any) -> int:
    return layer.in_features if hasattr(layer, "in_features") else layer.in_channels


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
