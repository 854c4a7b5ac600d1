"""Where the bytes of a pruned network with shared values go, stage by stage, as in the tables of Deep Compression.

Han, Mao and Dally, arXiv:1510.00149, tables 1 to 5: weights that are left with relative indices; shared values in their
place; Huffman codes of both. Beside it the same values under the context coder, and the pruned network without shared
values rounded by `shrink_file`. All stages count the weights of convolutions and linear layers and their codebooks,
nothing else (biases, norms and the graph are the same in all of them).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tersenet.bricks.settle import settle
from tersenet.bricks.shared import shared_layers
from tersenet.codec import tensors
from tersenet.codec.estimate import coded_bytes
from tersenet.errors import SettingsError
from tersenet.graph.fold import fold, foldable_in
from tersenet.numerics.scale import ACCURACY, Scale
from tersenet.numerics.sparse_bytes import distances
from tersenet.size.shrink_file import ShrinkFile
from tersenet.step import replace
from tersenet.task import Task, score_model

_INDEX = {True: 8, False: 5}  # bits of a distance in convolutions, in linear layers


@dataclass(frozen=True)
class Stage:
    """A stage's name, the bytes of all weights after it, and its score where a network of its own was scored."""

    name: str
    bytes: int
    score: float | None = None


def stages(pruned: nn.Module, shared: nn.Module, task: Task, max_drop: float = 0.1) -> list[Stage]:
    """The stages of a network that has shared values, and what it was before it got them.

    Args:
        pruned: before the values were shared; its zeros count, masked or not.
        shared: after they were trained.
        task: its calibration data rounds the last stage; its test set scores that, once, where there is one.
        max_drop: what `shrink_file` may lose in the last stage, in points.
    """
    pruned = settle(copy.deepcopy(pruned))
    weights = {path: layer.weight.detach() for path, layer in _layers(pruned)}
    values = {path: (layer.weight.detach(), part) for path, layer, part in shared_layers(shared)}
    rows = [Stage("float32 weights", 4 * sum(weight.numel() for weight in weights.values()))]
    rows.append(Stage("pruned, relative indices", sum(_distances(w, 32) for w in weights.values())))
    clustered = huffman = contexts = 0
    for path, plain in weights.items():
        if path not in values:
            size = _distances(plain, 32)
            clustered, huffman, contexts = clustered + size, huffman + size, contexts + coded_bytes(plain)
            continue
        found, part = values[path]
        count = part.values + part.zero
        clustered += _distances(found, max(1, (count - 1).bit_length())) + 4 * count
        huffman += min(_coded(found, form) for form in ("relative", "huffman"))
        contexts += coded_bytes(found)
    rows.append(Stage("shared values", clustered))
    rows.append(Stage("Huffman codes", huffman))
    rows.append(Stage("same values, context coding", contexts))
    return [*rows, *_rated(pruned, task, max_drop)]


def table(rows: list[Stage], scale: Scale = ACCURACY) -> str:
    """The stages as text, each against the first and against the one before it.

    Args:
        scale: what the scores are counted in.
    """
    width = max(len(row.name) for row in rows)
    lines = [f"{'weights after':{width}}      bytes  smaller  than before   score"]
    for before, row in zip([rows[0], *rows], rows, strict=False):
        score = "" if row.score is None else scale.text(row.score)
        factors = f"{rows[0].bytes / row.bytes:7.1f}x {before.bytes / row.bytes:11.2f}x"
        lines.append(f"{row.name:{width}} {row.bytes:10,} {factors} {score:>7}")
    return "\n".join(line.rstrip() for line in lines)


def as_dicts(rows: list[Stage]) -> list[dict[str, Any]]:
    """For the report."""
    return [
        {"stage": row.name, "bytes": row.bytes, **({} if row.score is None else {"score": row.score})} for row in rows
    ]


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(path, layer) for path, layer in model.named_modules() if isinstance(layer, _ConvNd | nn.Linear)]


def _distances(weight: Tensor, bits: int) -> int:
    """With relative indices, or in full where that is smaller."""
    there = weight != 0
    sparse = distances(there, int(there.sum()), bits, _INDEX[weight.dim() > 2])
    return min(sparse, -(-weight.numel() * bits // 8))


def _coded(weight: Tensor, form: str) -> int:
    flat = (weight.detach().cpu() + 0.0).contiguous()
    data = flat.reshape(-1).view(torch.uint8).numpy()
    return len(tensors.encode("float32", tuple(weight.shape), data, (form,))[1])


def _rated(pruned: nn.Module, task: Task, max_drop: float) -> list[Stage]:
    """The pruned network, norms folded, rounded by price."""
    if task.calibrate is None and task.train is None and task.validate is None:
        return []
    for layer, norm in foldable_in(pruned, task.example)[0]:
        fold(pruned.get_submodule(layer), pruned.get_submodule(norm))
        replace(pruned, {norm: nn.Identity()})
    try:
        made, _ = ShrinkFile(max_drop=max_drop).run(pruned, task)
    except SettingsError:  # no price loses so little, or the outputs cannot be judged
        return []
    score = None if task.test is None else score_model(made, task, task.test).value
    size = sum(coded_bytes(layer.weight) for _, layer in _layers(made))
    return [Stage("pruned, shrink_file", size, score)]
