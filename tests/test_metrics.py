"""A task's own metric: of samples and of whole sets, with its name, unit and direction in every score and loss."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersenet.errors import DataError, SettingsError
from tersenet.gate import gate
from tersenet.job import compress
from tersenet.metrics import Metric, metric_of
from tersenet.numerics.scale import ACCURACY, Scale
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.recipe import Recipe
from tersenet.repeat import _judge
from tersenet.scored_on import scored_on
from tersenet.task import Task, score, score_model


def error(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (outputs[:, 0] - batch[1]).abs()


MAE = Metric(error, name="MAE", unit="px", higher_is_better=False)


def confusion(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """(N, 2, 2): how many pixels of each class became which."""
    found = torch.stack([batch[1].flatten(1) * 2 + outputs.argmax(1).flatten(1) == k for k in range(4)], dim=1)
    return found.sum(-1).reshape(-1, 2, 2)


def iou(counts: Tensor) -> Tensor:
    whole = counts.sum(0).double()
    return (whole.diag() / (whole.sum(0) + whole.sum(1) - whole.diag())).mean()


def segments(seed: int, images: int = 40) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 2, (images, 6, 6), generator=drawn)
    right = torch.rand(images, 6, 6, generator=drawn) < 0.8
    picked = torch.where(right, target, 1 - target)
    return nn.functional.one_hot(picked, 2).movedim(-1, 1).double(), target


def test_a_metric_of_a_set_is_computed_over_all_batches_and_not_as_a_mean_of_them() -> None:
    outputs, target = segments(0)
    batches = [(outputs[:7], target[:7]), (outputs[7:], target[7:])]
    found = score(lambda batch: batch[0], batches, Metric(confusion, iou, name="mIoU"))
    matrix = np.zeros((2, 2))
    np.add.at(matrix, (target.flatten().numpy(), outputs.argmax(1).flatten().numpy()), 1)
    wanted = np.mean([matrix[k, k] / (matrix[k].sum() + matrix[:, k].sum() - matrix[k, k]) for k in range(2)])
    assert found.value == pytest.approx(wanted)
    assert (found.samples, found.scale) == (40, Scale("mIoU"))
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high
    assert found == score(lambda batch: batch[0], batches, Metric(confusion, iou, name="mIoU"))


def test_the_interval_of_a_set_is_as_wide_as_its_score_varies() -> None:
    values = [float(iou(confusion(outputs, (outputs, target)))) for outputs, target in map(segments, range(100))]
    low, high = np.quantile(values, (0.025, 0.975))
    found = score(lambda batch: batch[0], [segments(0)], Metric(confusion, iou, name="mIoU"))
    assert found.interval is not None
    assert 0.6 < (found.interval[1] - found.interval[0]) / (high - low) < 1.6


def test_a_list_per_image_serves_detections() -> None:
    boxes = [[(0.9, 1), (0.4, 0)], [], [(0.8, 1)]]
    seen: list[int] = []

    def precision(images: list[list[tuple[float, int]]]) -> float:
        seen.append(len(images))
        found = [hit for image in images for _, hit in image]
        return sum(found) / len(found) if found else float("nan")

    metric = Metric(lambda outputs, batch: outputs, precision, name="mAP")
    found = score(lambda batch: batch, [boxes[:2], boxes[2:]], metric)
    assert found.value == pytest.approx(2 / 3)
    assert found.samples == 3
    assert set(seen) == {3}
    assert score(lambda batch: batch, [boxes], dataclasses.replace(metric, resamples=0)).interval is None
    with pytest.raises(DataError, match="the metric 'mAP' gives NaN"):
        score(lambda batch: batch, [[[]]], metric)


def test_a_draw_that_has_no_score_gives_no_interval_rather_than_a_wrong_one() -> None:
    metric = Metric(lambda outputs, batch: outputs, lambda x: x.mean() if x.max() == 1 else float("nan"))
    assert score(lambda batch: batch, [torch.tensor([1.0, 0.0, 0.0])], metric).interval is None


def test_lower_is_better_and_a_unit() -> None:
    data = [(torch.tensor([[1.0], [3.0]]), torch.zeros(2)), (torch.tensor([[5.0]]), torch.zeros(1))]
    found = score(lambda batch: batch[0], data, MAE)
    assert (found.value, found.samples) == (3.0, 3)
    assert found.scale.text(found.value) == "3 px"
    assert found.scale.lost(3.0, 3.5) == 0.5
    assert found.scale.loss_text(0.5) == "0.5 px"
    assert found.scale.worse((3.4, 3.6), 3.3)
    assert not found.scale.worse((2.0, 2.5), 3.3)
    assert Scale("PSNR", "dB").lost(30.0, 29.0) == 1.0
    assert ACCURACY.lost(0.9, 0.89) == pytest.approx(1.0)


@pytest.mark.parametrize("values", [[-3.0, 0.5], [0.5, 1.5]])
def test_a_plain_function_gives_shares_and_what_is_none_is_refused(values: list[float]) -> None:
    with pytest.raises(DataError, match=r"a share lies between 0 and 1; say what it is counted in.*unit='px'"):
        score(lambda batch: batch, [torch.tensor(values)], lambda outputs, batch: outputs)


def test_a_plain_function_lends_its_name() -> None:
    assert metric_of(error).scale == Scale("error")
    assert metric_of(lambda outputs, batch: outputs).name == "score"
    with pytest.raises(SettingsError, match="the name of a metric is empty"):
        Metric(error, name=" ")


def test_another_metric_is_another_score_and_the_same_one_is_known_again() -> None:
    task = Task(torch.zeros(2, 1), test=[(torch.zeros(2, 1), torch.zeros(2))], metric=MAE)
    others = [dataclasses.replace(MAE, unit="mm"), dataclasses.replace(MAE, compute=torch.median), error]
    digests = [scored_on(dataclasses.replace(task, metric=each)) for each in (MAE, *others)]
    assert len(set(digests)) == 4
    assert scored_on(task) == digests[0]


class Column(nn.Module):
    """Regresses a number; that of fewer channels is worse."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


def regression() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    model = Column().eval()
    x = torch.randn(64, 4)
    with torch.no_grad():
        y = model(x)[:, 0] + 0.1
    data = [(x[:32], y[:32]), (x[32:], y[32:])]
    return model, Task(x[:2], calibrate=data, validate=data, test=data, metric=MAE, quiet=True)


def test_a_drop_is_what_became_worse() -> None:
    model, task = regression()
    _, lost = _judge(model, task, 10)
    worse = Column().eval()
    assert lost(worse) == pytest.approx(score_model(worse, task, task.test).value - 0.1, abs=1e-5)  # type: ignore[arg-type]


def test_a_run_says_name_unit_and_direction_everywhere(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, task = regression()
    run = compress(
        model, task, Recipe((PruneChannels(sparsity=0.5, refit=False),)), out=tmp_path / "run", max_drop=0.001
    )
    assert run.report["metric"] == {"name": "MAE", "unit": "px", "higher_is_better": False}
    (aim,) = run.report["targets"]
    assert (aim["wanted"], aim["met"]) == ("0.001 px", False)
    assert "px of MAE lost" in run.verdict
    assert "%" not in run.verdict.replace("95 % interval", "")
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    card = (run.folder / "README.md").read_text(encoding="utf-8")
    for text in (page, card):
        assert "MAE, lower is better" in text
        assert "0.1 px" in text
    gated = gate(run.folder, max_drop=0.001)
    assert gated["targets"][0]["what"] == "px of MAE lost"
    assert gated["targets"][0]["got"] > 0.001
    assert json.loads((run.folder / "report.json").read_text(encoding="utf-8"))["rows"][0]["score"] == pytest.approx(
        0.1
    )


def test_a_draw_that_cannot_be_computed_is_left_out() -> None:
    """Of few samples some draws lack a class, and then the metric raises."""

    def least(values: Tensor) -> Tensor:
        if len(values.unique()) < 3:
            raise ValueError("a class is missing")
        return values.mean()

    metric = Metric(lambda outputs, batch: outputs[:, 0], compute=least, unit="")
    value, low, high = metric.score([torch.arange(6.0)])
    assert value == 2.5
    assert low is not None
    assert high is not None
    assert low < value < high


def test_one_number_for_a_batch_is_refused() -> None:
    data = [(torch.zeros(4, 2), torch.zeros(4))]
    with pytest.raises(DataError, match="gives one number for a batch; give one for each sample"):
        score(lambda batch: batch[0], data, Metric(lambda outputs, batch: outputs.mean(), name="PSNR", unit="dB"))
