from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tersenet.bricks.settle import settle
from tersenet.deploy.folded import with_half_weights
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.reference import Reference
from tersenet.deploy.runtimes import Runner, open_file, open_module
from tersenet.deploy.stepwise import SLACK, Steps, stepwise
from tersenet.deploy.verify import Agreement, check, compare, score_file, verify
from tersenet.errors import DataError, ExportError
from tersenet.quantization.quantize import Quantize
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
    assert (agreement.max_abs_error, agreement.max_abs_output) == (0.25, 39.0)
    assert (agreement.samples, agreement.same_top1, agreement.rms_error) == (10, 1.0, pytest.approx(0.25 / 40**0.5))
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
        check(replace(agreement, allowed=1e9, allowed_rms=1e9))
    assert verify(runner_of(lambda y: y), nn.Identity(), [there]).max_abs_error == 0.0  # on both sides: they agree


def test_an_error_is_held_to_what_is_allowed_at_most_and_on_average():
    agreement = Agreement(9e-4, 10.0, 8, 1.0, allowed=1e-3, rms_error=1e-4, allowed_rms=2e-4)
    check(agreement)
    with pytest.raises(ExportError, match=r"m\.onnx does not agree .* 0\.002 on outputs up to 10, over 8 .* 0\.001"):
        check(replace(agreement, max_abs_error=2e-3), "m.onnx")
    with pytest.raises(ExportError, match=r"root mean square is 0\.0003, allowed is 0\.0002"):
        check(replace(agreement, rms_error=3e-4))
    with pytest.raises(ExportError, match=r"at relu_out: 5 % of its integers are off, by up to 2.5 steps"):
        check(replace(agreement, steps=Steps(2.0, 0.05, "relu_out", 3)))


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
        assert verify(runner, tiny_model, data).samples == 11
        agreement = compare(runner, Reference(tiny_model, data[0][0], data))
        assert agreement.samples == 11 + 3
        assert agreement.max_abs_error < 1e-5 < agreement.max_abs_output
        check(agreement)
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


def test_a_variant_of_the_model_is_allowed_and_no_more(tiny_model):
    example = torch.randn(4, 3, 8, 8)
    before, after = (Reference(tiny_model, example, [example]) for _ in range(2))
    half = with_half_weights(tiny_model, example)
    after.allow(half)
    compare_half = compare(open_module(half), before), compare(open_module(half), after)
    assert [each.agrees for each in compare_half] == [False, True]
    wrong = with_half_weights(tiny_model, example)
    next(iter(wrong.parameters())).data.mul_(1.1)
    assert not compare(open_module(wrong), after).agrees


class Enlarging(nn.Module):
    """Operators between two roundings that enlarge what float32 arithmetic in another order differs by."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = nn.functional.layer_norm(self.first(x), (14,))
        return self.second(torch.sin(500 * normed)).mean((2, 3))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_integers_may_be_off_by_what_float_operators_before_them_enlarge(runtime: str, tmp_path: Path) -> None:
    x = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    task = Task(example=x[:2], calibrate=[x], quiet=True)
    simulated = settle(Quantize(samples=16).run(Enlarging().eval(), task)[0])
    path = export_onnx(simulated, x[:2], tmp_path / "q.onnx")
    steps = stepwise(path, runtime, Reference(simulated, x[:2], [x]))
    assert steps is not None
    assert steps.beyond > SLACK  # more than a convolution of integers is ever off by
    assert steps.node == ""
