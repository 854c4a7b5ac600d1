"""Half of the channels of the reference networks: cut, run, exported, and the file computes the same."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tersenet import models
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.runtimes import open_file
from tersenet.graph.costs import totals
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.sources import example_of
from tersenet.task import Task

FAST = ("resnet20", "resnet18", "mobilenet_v2")
REST = ("resnet32", "resnet44", "resnet56", "resnet110", "resnet34", "resnet50")


def check(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = models.build(name).eval()
    example = example_of(models.REFERENCES[name].preparation)
    step = PruneChannels(sparsity=0.5, residual=True, refit=False)
    thin = step.apply(copy.deepcopy(model), step.plan(model, Task(example=example)))
    before, after = totals(model, example), totals(thin, example)
    assert after.macs < 0.32 * before.macs
    assert after.params < 0.42 * before.params
    with torch.no_grad():
        expected = thin(example)
    assert expected.shape == model(example).shape
    path = export_onnx(thin, example, folder / "model.onnx")
    got = torch.from_numpy(open_file(path).run(example.numpy()))
    assert float((expected - got).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.minutes
@pytest.mark.parametrize("name", FAST)
def test_half_of_the_channels(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)
    assert (tmp_path / "model.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_half_of_the_channels_of_the_rest(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)
    assert (tmp_path / "model.onnx").exists()
