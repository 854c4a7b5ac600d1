"""What single weights are worth, by name: the formulas of numerics/saliency.py with what each needs of the data."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.numerics import saliency
from tersenet.task import Task

# name -> what it needs of the data
DATA = {
    "l1": "nothing",
    "l2": "nothing",
    "lamp": "nothing",
    "random": "nothing",
    "gradient": "inputs",
    "taylor": "inputs",
    "fisher": "inputs",
    "obs": "inputs",
}
IMPORTANCES = tuple(DATA)
FROM_WEIGHTS = {"l1": saliency.l1, "l2": saliency.l2, "lamp": saliency.lamp}


def scores_of(
    model: nn.Module, layers: Mapping[str, Any], task: Task, importance: str, samples: int
) -> dict[str, Tensor]:
    """Path -> float64 of the weight's shape, higher is more important.

    Args:
        layers: those of the model that are judged, by path.
        samples: how many calibration samples may be read.
    Raises:
        DataError: without the data that the importance needs.
    """
    if importance in FROM_WEIGHTS:
        return {path: FROM_WEIGHTS[importance](layer.weight) for path, layer in layers.items()}
    if importance == "random":
        return {path: _chance(layer.weight, task.seed, path) for path, layer in layers.items()}
    if importance == "obs":
        from tersenet.pruning.refit import surgeon_scores

        return surgeon_scores(model, layers, task, samples)
    from tersenet.pruning.importance import weight_gradients

    moments = weight_gradients(model, task, list(layers), samples)
    if importance == "gradient":
        return {path: saliency.gradient(moments[path].size) for path in layers}
    if importance == "taylor":
        return {path: saliency.taylor(layer.weight, moments[path].size) for path, layer in layers.items()}
    return {path: saliency.fisher(layer.weight, moments[path].square) for path, layer in layers.items()}


def _chance(weight: Tensor, seed: int, path: str) -> Tensor:
    """[0, 1), the same for the same seed and path on every device."""
    generator = np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(path.encode())]))
    return torch.from_numpy(generator.random(tuple(weight.shape))).to(weight.device)
