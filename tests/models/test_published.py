"""Preparations of published networks: timm's configurations, torchvision's presets, folders of the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tersenet.errors import DataError, InputWarning
from tersenet.models import published
from tersenet.task import Preparation

TIMM = {"input_size": (3, 224, 224), "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3), "interpolation": "bicubic",
        "crop_pct": 0.875, "crop_mode": "center"}  # fmt: skip
CLIP = {
    "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3, "do_center_crop": True,
    "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224},
}  # fmt: skip


def test_timm() -> None:
    assert published.of_timm(TIMM) == Preparation((224, 224), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), (), "bicubic", 0.875)
    with pytest.warns(InputWarning, match="crop_mode 'squash'"):
        published.of_timm({**TIMM, "crop_mode": "squash"})


def test_torchvision() -> None:
    preset = SimpleNamespace(
        mean=[0.4, 0.4, 0.4], std=[0.2, 0.2, 0.2], resize_size=[232], interpolation=SimpleNamespace(value="bilinear")
    )
    found = published.of_torchvision(preset, (224, 224), ["a"])
    assert found == Preparation((224, 224), (0.4,) * 3, (0.2,) * 3, ("a",), "bilinear", 224 / 232)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CLIP, Preparation((224, 224), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), (), "bicubic", 224 / 256)),
        (
            {"image_mean": [0.5], "image_std": [0.5], "size": 32, "do_center_crop": False, "resample": 2},
            Preparation((32, 32), (0.5,), (0.5,)),
        ),
        (
            {"image_mean": [0.5], "image_std": [0.5], "size": {"height": 30, "width": 40}, "do_normalize": False},
            Preparation((30, 40), (0.0,), (1.0,)),
        ),
        (  # pixels from 0 to 2, less 1
            {"image_mean": [1.0], "image_std": [1.0], "size": 8, "rescale_factor": 1 / 127.5},
            Preparation((8, 8), (0.5,), (0.5,)),
        ),
        ({"size": 3}, None),
    ],
)
def test_transformers(config: dict[str, Any], expected: Preparation | None, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    found = published.beside(tmp_path / "model.safetensors")
    assert found == expected
    assert found is None or found.source == "its preprocessor_config.json"


def test_timm_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": TIMM}))
    assert published.beside(tmp_path / "model.safetensors#ema") == published.of_timm(TIMM)
    assert published.beside(tmp_path / "elsewhere" / "model.safetensors") is None


def test_a_form_that_is_not_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**CLIP, "crop_size": {"side": 3}}))
    with pytest.raises(DataError, match=r"preprocessor_config\.json says how .*KeyError.* give --mean"):
        published.beside(tmp_path / "model.safetensors")
