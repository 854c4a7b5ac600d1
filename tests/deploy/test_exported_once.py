"""torch's ONNX exporter runs once for the same graph with the same numbers, and again for any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tersenet import FoldBatchNorm, Task
from tersenet.deploy import exported_once
from tersenet.deploy.onnx import export_onnx


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    ).eval()


def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(exported_once, "_known", type(exported_once._known)())
    made: list[Any] = []
    real = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: made.append(args) or real(*args, **kwargs))
    return made


def right(model: nn.Module, path: Path, **kwargs: Any) -> None:
    export_onnx(model, x(), path, **kwargs)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"input": x().numpy()})[0], model(x()).detach(), rtol=1e-4, atol=1e-5)


def test_folding_batch_norms_changes_no_file(count: list[Any], tmp_path: Path) -> None:
    model = network()
    right(model, tmp_path / "a.onnx", metadata={"who": "a"})
    folded, _ = FoldBatchNorm().run(copy.deepcopy(model), Task(example=x()))
    right(folded, tmp_path / "b.onnx", metadata={"who": "b"})
    assert len(count) == 1
    assert (tmp_path / "a.onnx").read_bytes() != (tmp_path / "b.onnx").read_bytes()  # each has its own metadata
    right(model, tmp_path / "c.onnx", metadata={"who": "a"})
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "c.onnx").read_bytes()


def change_a_weight(model: Any) -> None:
    model[4].weight.data[3, 7] += 1e-3


def change_a_setting(model: Any) -> None:
    model[2] = nn.LeakyReLU(0.1)


def change_a_constant(model: Any) -> None:
    model[2].negative_slope = 0.3


@pytest.mark.parametrize("change", [change_a_weight, change_a_setting, change_a_constant])
def test_what_changes_the_file_is_exported_anew(
    change: Callable[[Any], None], count: list[Any], tmp_path: Path
) -> None:
    model = network()
    model[2] = nn.LeakyReLU(0.2)
    right(model, tmp_path / "a.onnx")
    change(model)
    right(model, tmp_path / "b.onnx")
    assert len(count) == 2


def test_files_that_are_kept_are_bounded(count: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported_once, "_MOST_BYTES", 10_000)
    model = network()
    for _ in range(4):
        change_a_weight(model)
        right(model, tmp_path / "a.onnx")
    assert 1 <= len(exported_once._known) < 4
    assert sum(map(len, exported_once._known.values())) <= 10_000
