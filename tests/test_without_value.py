"""Outputs that hold NaN: said in a score, refused in a file, and never counted in silence."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersenet import Quantize, Task, compress
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.reference import Reference
from tersenet.deploy.runner import Runner
from tersenet.deploy.verify import compare
from tersenet.errors import DataError, ExportError, InputWarning, ModelError
from tersenet.predict import predict_images
from tersenet.task import Preparation, score

X = torch.rand(32, 1, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.5


class Root(nn.Module):
    """NaN for images whose first pixel is negative."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.BatchNorm2d(1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).flatten(1)) + x[:, 0, :1, 0].sqrt()


def some_negative(count: int) -> Tensor:
    x = X.clone()
    x[:count, 0, 0, 0] = -1
    return x


def test_a_score_says_how_many_and_counts_them_as_wrong() -> None:
    logits = torch.eye(6).repeat(2, 1)
    target = torch.arange(6).repeat(2)
    data = [(logits[:7], target[:7]), (logits[7:], target[7:])]
    logits[3, 3] = math.nan  # which topk takes for the largest, and so for a hit
    logits[9] = math.nan
    logits[10, 4] = math.inf  # a number
    with pytest.warns(InputWarning, match="the outputs of 2 of 12 samples hold NaN, which an accuracy counts as wrong"):
        found = score(lambda batch: batch[0], data)
    assert (found.value, found.top5, found.without_value) == (10 / 12, 10 / 12, 2)
    assert score(lambda batch: batch[0].nan_to_num(), data).without_value == 0


def test_of_a_metric_too() -> None:
    data = [(some_negative(4), torch.zeros(32))]
    with pytest.warns(InputWarning, match="4 of 32 samples hold NaN"):
        assert score(lambda batch: batch[0].sqrt(), data, lambda outputs, _: torch.ones(len(outputs))).value == 1
    with pytest.raises(DataError, match=r"the metric gives NaN for 4 of 32 samples.*\(4 of them"):
        score(lambda batch: batch[0].sqrt(), data, lambda outputs, _: outputs.flatten(1).mean(1))


def test_a_run_of_a_model_that_gives_nan_is_refused(tmp_path: Path) -> None:
    task = Task(example=X[:2], calibrate=[(some_negative(3),)], quiet=True)
    with pytest.raises(ExportError, match="the model's outputs hold NaN for 3 of the 24 inputs"):
        compress(Root().eval(), task, [Quantize(activations=None)], out=tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.onnx"))


def test_a_run_says_of_how_many_test_images_it_knows_nothing(tmp_path: Path) -> None:
    test = [(some_negative(5), torch.zeros(32, dtype=torch.int64))]
    task = Task(example=X[:2], calibrate=[(X,)], test=test, quiet=True)
    with pytest.warns(InputWarning, match="5 of 32 samples"):
        run = compress(Root().eval(), task, [Quantize(activations=None)], out=tmp_path / "run")
    assert any("onnxruntime: the outputs of 5 of 32 samples hold NaN" in text for text in run.report["warnings"])


def test_a_file_that_gives_nan_wherever_its_model_does_is_not_right_for_that() -> None:
    reference = Reference(Root().eval(), X[:2], [(some_negative(32),)])
    runner = Runner("onnxruntime", None, (None, 1, 4, 4), lambda x: np.full((len(x), 3), np.nan, np.float32))
    with pytest.raises(ExportError, match="hold NaN for 24 of the 24 inputs"):
        compare(runner, reference)


def test_no_class_is_predicted_of_nan(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "black.png")
    path = export_onnx(Root().eval(), X[:2], tmp_path / "m.onnx", Preparation((4, 4), (0.5,), (0.5,)))
    with pytest.raises(ModelError, match=r"m\.onnx gives NaN for .*black\.png"):
        predict_images(path, [tmp_path / "black.png"])
