"""Names of formats, and what a plan says of them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from tersenet import compress
from tersenet.dry_run import dry_run
from tersenet.errors import ModelError, SettingsError
from tersenet.quantization.formats import Format, Storage
from tersenet.quantization.quantize import Quantize
from tersenet.recipe import Recipe
from tersenet.task import Task


@pytest.mark.parametrize(
    ("name", "kind", "bits"),
    [
        ("int2", "grid", 2), ("int8", "grid", 8), ("fp16", "float", 16), ("bf16", "float", 16),
        ("fp8_e4m3", "float", 8), ("fp8_e5m2", "float", 8), ("pot5", "power", 5), ("kmeans1", "book", 1),
        ("ternary", "ternary", 2), ("binary3", "bases", 3), ("pq", "piece", 2),
    ],
)  # fmt: skip
def test_names_say_the_code_and_the_bits(name: str, kind: str, bits: int) -> None:
    found = Format.named(name)
    assert (found.kind, found.bits) == (kind, bits)


@pytest.mark.parametrize(
    "name", ["int1", "int9", "int", "pot1", "kmeans0", "kmeans9", "binary5", "fp32", "", "xint4", "int42"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="must be a format"):
        Format.named(name)


def test_pieces_fit_the_layer() -> None:
    storage = Storage(piece=4, pieces=256)
    assert storage.entry("pq", (64, 64, 3, 3)) == {
        "weights": "pq", "code": "piece", "length": 4, "count": 256, "shared": True,
    }  # fmt: skip
    three = storage.entry("pq", (64, 1, 3, 3))
    assert three is not None
    assert (three["length"], three["count"]) == (3, 48)
    assert storage.entry("pq", (2, 7)) is None, "7 has no divisor up to 4"
    assert storage.entry("pq", (1, 4)) is None, "a codebook would be as large as the weights"


def test_entries_hold_what_the_formats_leave_open() -> None:
    storage = Storage(granularity=32, symmetric=False)
    entry = storage.entry("int4", (8, 64))
    assert entry == {"weights": "int4", "code": "grid", "bits": 4, "signed": False, "granularity": 32}
    assert storage.entry("binary2", (8, 64)) == {"weights": "binary2", "code": "bases", "count": 2}
    assert storage.entry("bf16", (8, 64)) == {"weights": "bf16", "code": "float", "format": "bf16"}


def test_formats_for_layers_that_there_are_not_are_refused() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).eval(), torch.randn(2, 3, 8, 8)
    task = Task(example=x, calibrate=[(x,)], quiet=True)
    with pytest.raises(SettingsError, match="formats names 'layer9"):
        Quantize(formats={"layer9.*": "float"}).run(model, task)
    assert "2" not in Quantize(formats={"2": "float"}).run(model, task)[1]["layers"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_are_refused_in_one_sentence(dtype: torch.dtype) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval().to(dtype), torch.randn(2, 3, 8, 8)
    with pytest.raises(ModelError, match=r"0.weight is b?float16.*model.float\(\)"):
        Quantize().run(model, Task(example=x.to(dtype), calibrate=[(x.to(dtype),)], quiet=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_run_of_another_precision_is_refused_in_one_sentence(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval(), torch.randn(2, 3, 8, 8)
    for steps in ([Quantize()], [Quantize(activations=None)]):
        for made, inputs, said in (
            (copy.deepcopy(model).to(dtype), x.to(dtype), "0.weight is"),
            (copy.deepcopy(model).to(dtype), x, "0.weight is"),
            (model, x.to(dtype), "input 0 of the example is"),
        ):
            task = Task(example=inputs, calibrate=[(inputs,)], quiet=True)
            with pytest.raises(ModelError, match=rf"{said} b?float\d\d.*model.float\(\)"):
                compress(made, task, steps, out=tmp_path / "run")
            with pytest.raises(ModelError, match=said):
                dry_run(made, task, Recipe(tuple(steps)))
