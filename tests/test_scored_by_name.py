"""Files are scored by class name where both sides have names, and by the output of class scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pictures import class_folders
from tersenet.deploy.onnx import export_onnx
from tersenet.errors import DataError, InputWarning
from tersenet.files import measure_files
from tersenet.predict import predict_images
from tersenet.task import Preparation

RGB = Preparation((8, 8), (0.0,) * 3, (1.0,) * 3, ("green", "blue", "white", "red"))
WORDS = {"red": "red", "blue": "blue"}


class Colours(nn.Module):
    """Names a colour right: its class scores stand second, in a dict; those of the first output are always wrong."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        r, g, b = x.mean((2, 3)).unbind(1)
        scores = torch.stack([g - r - b, b - r - g, r + g + b - 2.5, r - g - b], dim=1)
        return {"worst": -scores, "logits": scores}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    pytest.importorskip("onnxruntime")
    return export_onnx(Colours().eval(), torch.rand(2, 3, 8, 8), tmp_path / "model.onnx", RGB)


def test_a_folder_of_some_of_the_classes_is_scored_as_these(tmp_path: Path, file: Path) -> None:
    for split in ("train", "test"):
        class_folders(tmp_path / "data" / split, WORDS, 3)
    entry = measure_files([file], data=f"folder:{tmp_path / 'data'}", quiet=True)["files"][str(file)]
    assert (entry["score"], entry["samples"], entry["scored_output"]) == (1.0, 6, "logits")


def test_predict_names_the_output_of_class_scores(tmp_path: Path, file: Path) -> None:
    class_folders(tmp_path / "data", WORDS, 1)
    images = sorted((tmp_path / "data").rglob("*.png"))
    found = predict_images(file, images)
    assert [found[str(path)][0]["label"] for path in images] == [path.parent.name for path in images]


def test_classes_that_the_file_does_not_know_are_refused_before_anything_is_timed(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersenet.files.measure_in_runtimes", None)
    for split in ("train", "test"):
        class_folders(tmp_path / "data" / split, {"red": "red", "car": "blue"}, 1)
    with pytest.raises(DataError, match="car"), pytest.warns(InputWarning):
        measure_files([file], data=f"folder:{tmp_path / 'data'}", quiet=True)
