"""Formats for single layers: chosen by hand, by sensitivity, by a search under a budget of bytes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from cases import batches, task_for, tiny
from tersenet.deploy.onnx import export_onnx
from tersenet.errors import SettingsError
from tersenet.quantization.quantize import Quantize
from tersenet.quantization.sensitivity import spared
from tersenet.search.search import Search

LAYERS = {"conv1", "block.conv", "conv2", "depthwise", "pointwise", "linear"}


def test_choices_are_the_formats_that_are_offered() -> None:
    model = tiny()
    task = task_for(model)
    choices = Quantize(offer=("int4", "int2")).choices(model, task)
    assert set(choices) == LAYERS
    assert choices["conv1"] == ["int8", "int4", "int2", "float"]
    assert choices["linear"] == ["int8", "int4", "int2"]
    alone = Quantize(activations=None, offer=("kmeans3",), formats={"linear": "int6"}).choices(model, task)
    assert alone["linear"] == ["int6", "kmeans3"]
    assert "float" not in alone["conv1"]


def test_what_is_chosen_is_in_the_plan() -> None:
    model = tiny()
    task = task_for(model)
    step = Quantize(offer=("int4", "int2")).chosen({"conv2": "int2", "conv1": "float", "linear": "int8"})
    assert step == Quantize(formats={"conv2": "int2"}, skip=("conv1",))
    plan = step.plan(model, task)
    assert plan["layers"]["conv2"]["weights"] == "int2"
    assert plan["layers"]["linear"]["weights"] == "int8"
    assert "conv1" in plan["float"]


def test_fewer_bits_hurt_more_and_nothing_is_touched() -> None:
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = Quantize(offer=("int4", "int2")).sensitivities(model, task_for(model), batches()[0][0])
    assert set(found) == LAYERS
    for path, row in found.items():
        assert 0 <= row["int8"] < row["int4"] < row["int2"], path
    assert found["conv1"]["float"] == 0.0
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("activations", ["int8", None])
def test_the_layers_that_suffer_most_are_spared(activations: str | None) -> None:
    model = tiny()
    task = task_for(model)
    step = Quantize(weights="int2", activations=activations, spare=2)
    worst = spared(step, model, task)
    hurt = Quantize(weights="int2", activations=activations, offer=("int8",)).sensitivities(
        model, task, batches()[0][0]
    )
    assert len(worst) == 2
    assert activations is None or min(hurt[path]["int2"] for path in worst) > 0
    plan = step.plan(model, task)
    assert {path for path, entry in plan["layers"].items() if entry["weights"] == "int8"} - {"shortcut"} == set(worst)
    plain = Quantize(weights="int8", activations=activations, spare=1).plan(model, task)
    assert len([path for path, why in plain["float"].items() if why == "left out by formats"]) == 1


def test_offers_that_cannot_be_weighed_are_refused() -> None:
    with pytest.raises(SettingsError, match="offer goes with"):
        Quantize(weights="kmeans4", activations=None, offer=("int4",))
    with pytest.raises(SettingsError, match="no integer kernels"):
        Quantize(offer=("kmeans4",))


@pytest.mark.minutes
@pytest.mark.parametrize("activations", ["int8", None])
def test_a_search_spends_bytes_over_bits(
    activations: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERSENET_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.AvgPool2d(6),
        nn.Flatten(), nn.Linear(64, 6),
    ).eval()  # fmt: skip
    task = task_for(model)
    full = export_onnx(model, task.example, tmp_path / "float.onnx").stat().st_size
    step = Search(
        steps=(Quantize(activations=activations, offer=("int4", "int2")),), bytes=str(int(0.17 * full)), images=16
    )
    found = step.solve(copy.deepcopy(model), task)
    made = copy.deepcopy(model)
    for each in found.steps:
        made, _ = each.run(made, task)
    size = export_onnx(made, task.example, tmp_path / "made.onnx").stat().st_size
    assert found.met
    assert size <= 0.17 * full
    assert abs(found.said["picked"]["measured"] - size) <= 0.01 * size
    assert found.steps[0].formats  # type: ignore[attr-defined]
