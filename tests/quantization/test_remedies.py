"""Int8 that costs much: the culprit is named, and a remedy is named only when it was tried and works."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tersenet.quantization.remedies as module
from tersenet import Quantize, Task, compress
from tersenet.findings import collecting
from tersenet.quantization.remedies import LOST, lost

X = torch.randn(96, 3, 12, 12, generator=torch.Generator().manual_seed(0))
TASK = Task(example=X[:2], calibrate=[(part,) for part in X.split(32)], quiet=True)
INT8 = Path(__file__).parents[2] / "examples" / "int8.yaml"


class Net(nn.Module):
    """Four convolutions with one activation module for all of them; residual: the stream of the first is added to."""

    def __init__(self, activation: nn.Module, residual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.act, self.residual = activation, residual
        self.one, self.two = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.three, self.head = nn.Conv2d(12, 12, 3, padding=1), nn.Linear(12 * 16, 5)
        for layer in (self.stem, self.one, self.two, self.three, self.head):
            nn.init.kaiming_normal_(layer.weight)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        y = self.two(self.act(self.one(x)))
        x = self.act(x + y if self.residual else y)
        return self.head(F.avg_pool2d(self.act(self.three(x)), 3).flatten(1))


def planted(model: Net, makers: tuple[str, ...], readers: tuple[str, ...], factor: float = 1000) -> Net:
    """One channel a thousand times as large, and what reads it as much smaller: the same function."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name in makers:
            layer = made.get_submodule(name)
            layer.weight[3] *= factor
            layer.bias[3] *= factor
        for name in readers:
            made.get_submodule(name).weight[:, 3] /= factor
    torch.testing.assert_close(made(X), model(X), rtol=1e-3, atol=1e-4)
    return made


def findings(step: Quantize, model: nn.Module) -> list[str]:
    with collecting() as found:
        step.run(copy.deepcopy(model), TASK)
    return found


def loss(step: Quantize, model: nn.Module) -> float:
    made, _ = step.run(copy.deepcopy(model), TASK)
    with torch.no_grad():
        return lost([model(X)], [made(X)])


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.Hardswish()])
def test_of_a_healthy_network_nothing_is_said(activation: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "look", None)  # and no time is spent on places and remedies
    assert findings(Quantize(), Net(activation)) == []


def test_a_channel_of_another_scale_is_named_and_evened_out() -> None:
    model = planted(Net(nn.ReLU()), ("one",), ("two",))
    said = findings(Quantize(), model)
    assert said[0].startswith("rounding costs "), said
    assert "32 calibration images" in said[0], said
    assert said[1].startswith("one: "), said
    assert "channels are flushed to zero by the step of" in said[1], said
    assert "two loses" in said[1], said
    assert said[-1].startswith("equalise: true brings that from "), said
    assert said[-1].endswith("(tried)"), said
    assert loss(Quantize(), model) > 10 * LOST
    assert loss(Quantize(equalise=True), model) < LOST


def test_where_channels_cannot_be_evened_out_layers_stay_in_float() -> None:
    model = planted(Net(nn.LeakyReLU(0.2)), ("one",), ("two",))
    said = findings(Quantize(), model)
    assert said[-1].startswith("skip: [one, two], which leaves these in float, brings that from "), said
    assert loss(Quantize(equalise=True), model) > 10 * LOST, "so it is not recommended"
    assert loss(Quantize(skip=("one", "two")), model) < LOST


def test_what_does_not_help_is_not_recommended() -> None:
    model = planted(Net(nn.ReLU(), residual=True), ("norm", "two"), ("one", "three"))
    said = findings(Quantize(), model)
    assert any(text.startswith("stem: ") for text in said), said
    assert said[-1].startswith("activations: null, for a file as small and no faster, brings"), said
    assert not any("equalise" in text for text in said), said
    assert loss(Quantize(activations=None), model) < 0.1 * loss(Quantize(equalise=True), model)


def test_weights_that_share_a_step_are_given_one_for_each_channel() -> None:
    model = planted(Net(nn.ReLU()), ("one",), ("two",))
    step = Quantize(activations=None, granularity="tensor")
    said = findings(step, model)
    assert any("loses" in text and "weights to 8 bits" in text for text in said), said
    assert said[-1].startswith("granularity: channel brings that from "), said


def test_few_bits_are_repaired_or_given_more() -> None:
    said = findings(Quantize(weights="int2", rounding="nearest"), Net(nn.ReLU()))
    assert "rounding: repaired" in said[-1] or "formats: {" in said[-1], said
    assert findings(Quantize(activations="int2"), Net(nn.ReLU()))[-1].startswith("activations: int8 brings"), said


def test_a_run_and_its_report_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = planted(Net(nn.ReLU()), ("one",), ("two",))
    run = compress(model, Task(example=X[:2], calibrate=TASK.calibrate), INT8, out=tmp_path / "run")
    said = [text for text in run.report["warnings"] if text.startswith("quantize: ")]
    assert any("flushed to zero" in text for text in said)
    assert any("equalise: true brings" in text for text in said)
    assert "equalise: true brings that from" in capsys.readouterr().err
