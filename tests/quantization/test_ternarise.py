"""Ternary weights: what becomes ternary, trains, and how small the file is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import batches, task_for, tiny
from tersenet.bricks.few_bits import FewBitLayer
from tersenet.bricks.quantized import Int8Conv2d
from tersenet.deploy.artifact import load_terse, save_terse
from tersenet.errors import ModelError, SettingsError
from tersenet.models.cifar_resnet import resnet20
from tersenet.quantization.quantize import Quantize
from tersenet.quantization.ternarise import Ternarise
from tersenet.rewrite.settle import Settle
from tersenet.train import Train


def shared(method: str) -> dict[str, Any]:
    """One threshold for each layer; the trained scales of ttq are the layer's anyway."""
    return {} if method == "ttq" else {"granularity": "tensor"}


@pytest.mark.parametrize("method", ["twn", "twn_exact", "ttq"])
def test_it_trains_and_settles_to_three_values(method: str) -> None:
    model = tiny(0)
    task = task_for(model)
    changed, plan = Ternarise(method=method, **shared(method)).run(copy.deepcopy(model), task)  # type: ignore[arg-type]
    assert "conv1" not in plan["layers"]
    assert "linear" not in plan["layers"]
    assert isinstance(changed.get_submodule("block.conv"), FewBitLayer)

    def loss() -> float:
        changed.eval()
        with torch.no_grad():
            return float(sum(F.cross_entropy(changed(x), y) for x, y in batches()))

    first = loss()
    Train(epochs=8, learning_rate=0.05, logger="none").run(changed, task)
    assert loss() < 0.9 * first
    expected = changed(task.example).detach()
    settled = Settle().run(changed, task)[0].eval()
    layer = settled.get_submodule("conv2")
    assert type(layer) is (nn.Conv2d if method == "ttq" else Int8Conv2d)
    assert len(layer.weight.unique()) == 3
    torch.testing.assert_close(settled(task.example), expected, rtol=1e-4, atol=1e-5)


def test_edges_too_where_asked_for() -> None:
    plan = Ternarise(edges="same").plan(tiny(0), task_for(tiny(0)))
    assert {"conv1", "linear"} <= set(plan["layers"])


@pytest.mark.minutes
@pytest.mark.parametrize(("method", "most"), [("twn", 2.0), ("ttq", 2.0)])
def test_a_terse_file_takes_less_than_two_bits_a_weight(method: str, most: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = resnet20().eval()
    x = torch.randn(2, 3, 32, 32)
    task = task_for(model)
    task.example = x
    changed, _ = Ternarise(method=method, **shared(method)).run(model, task)  # type: ignore[arg-type]
    path = save_terse(changed, x, tmp_path / "m.terse")
    weights = sum(layer.weight.numel() for layer in changed.modules() if isinstance(layer, FewBitLayer))
    floats = 4 * (sum(p.numel() for p in changed.parameters()) - weights + 2 * 16 * 60)
    assert (path.stat().st_size - floats) * 8 / weights < most
    torch.testing.assert_close(load_terse(path)(x), changed.eval()(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "four"}, "method must be twn, twn_exact or ttq, got 'four'"),
        ({"granularity": "row"}, "granularity must be channel or tensor"),
        ({"edges": "int8"}, "edges must be float or same, got 'int8'"),
    ],
)
def test_bad_settings_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Ternarise(**settings)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = tiny(0)
    with torch.no_grad():
        model.conv2.weight[0] = float("nan")
    with pytest.raises(ModelError, match="conv2 hold NaN"):
        Ternarise().run(model, task_for(model))


def test_int8_ranges_are_found_with_the_ternary_weights() -> None:
    """What the runtime will compute with, and not the float weights that the values are made from."""
    model = tiny(0)
    task = task_for(model)
    model, _ = Ternarise().run(model, task)
    seen: list[bool] = []
    for layer in model.modules():
        if isinstance(layer, FewBitLayer):
            layer.register_forward_hook(lambda layer, _, __: seen.append(layer.passing))
    Quantize().run(model, task)
    assert seen
    assert not any(seen)
