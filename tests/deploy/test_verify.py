from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tersenet.deploy.runtimes import Runner, open_file
from tersenet.deploy.verify import Agreement, check, score_file, verify
from tersenet.errors import DataError, ExportError
from tersenet.task import Task, score_model


def runner_of(function, shape=(None, 4)) -> Runner:
    return Runner("onnxruntime", None, shape, function)


def test_the_largest_error_is_found_wherever_it_is():
    x = torch.arange(40.0).reshape(10, 4)

    def wrong(y: np.ndarray) -> np.ndarray:
        out = y.copy()
        out[y == 22] += 0.25  # one value of the sixth sample
        return out

    agreement = verify(runner_of(wrong), nn.Identity(), [(x[:3], None), (x[3:], None)])
    assert agreement == Agreement(max_abs_error=0.25, max_abs_output=39.0, samples=10, same_top1=1.0)
    swapped = verify(runner_of(lambda y: y[:, ::-1].copy()), nn.Identity(), [x])
    assert (swapped.same_top1, swapped.max_abs_error) == (0.0, 3.0)


def test_no_more_than_the_limit_is_compared():
    seen = []

    def count(y: np.ndarray) -> np.ndarray:
        seen.append(len(y))
        return y

    assert verify(runner_of(count), nn.Identity(), [torch.zeros(100, 4)] * 5, limit=150).samples == 150
    assert seen == [100, 50]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_or_infinity_on_one_side_is_an_infinite_error(bad):
    x = torch.ones(2, 4)
    there = x.clone()
    there[1, 1] = bad
    agreement = verify(
        runner_of(lambda y: np.where(np.arange(8).reshape(2, 4) == 5, np.float32(bad), y)), nn.Identity(), [x]
    )
    assert agreement.max_abs_error == math.inf
    with pytest.raises(ExportError, match="does not agree"):
        check(agreement, 1e9)
    assert verify(runner_of(lambda y: y), nn.Identity(), [there]).max_abs_error == 0.0  # on both sides: they agree


def test_the_tolerance_is_relative_on_large_outputs_only():
    check(Agreement(9e-5, 0.1, 8, 1.0), 1e-4)
    check(Agreement(9e-4, 10.0, 8, 1.0), 1e-4)
    with pytest.raises(
        ExportError, match=r"m\.onnx does not agree .* 0\.0002 on outputs up to 0\.1, over 8 .* 0\.0001"
    ):
        check(Agreement(2e-4, 0.1, 8, 1.0), 1e-4, "m.onnx")


def test_other_shapes_and_no_data_are_errors():
    with pytest.raises(ExportError, match=r"shape \(2, 3\) in onnxruntime, the model \(2, 4\)"):
        verify(runner_of(lambda y: y[:, :3]), nn.Identity(), [torch.ones(2, 4)])
    with pytest.raises(DataError, match="0 samples"):
        verify(runner_of(lambda y: y), nn.Identity(), [])


def test_a_real_file_agrees_and_scores_as_the_model_does(tiny_model, tiny_onnx, fixed_onnx):
    generator = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(n, 3, 8, 8, generator=generator), torch.randint(0, 6, (n,), generator=generator)) for n in (7, 4)
    ]
    task = Task(example=data[0][0])
    for path, runtime in ((tiny_onnx, "onnxruntime"), (fixed_onnx, "onnxruntime"), (tiny_onnx, "openvino")):
        pytest.importorskip(runtime)
        runner = open_file(path, runtime)
        agreement = verify(runner, tiny_model, data)
        assert agreement.samples == 11
        check(agreement, 1e-5)
        assert score_file(runner, task, data) == score_model(tiny_model, task, data)


def test_the_tasks_own_forward_and_metric_are_kept():
    task = Task(
        example=torch.ones(2, 4),
        forward=lambda model, batch: model(batch["pixels"]) * 2,
        metric=lambda outputs, batch: (outputs.sum(dim=1) == batch["sum"]).double(),
    )
    data = [{"pixels": torch.ones(3, 4), "sum": torch.tensor([8.0, 8.0, 7.0])}]
    got = score_file(runner_of(lambda y: y), task, data)
    assert got.value == pytest.approx(2 / 3)
    assert got.samples == 3
