"""`precision: auto`: chosen by timing, kept across a cut, and without a trace in the model or in chance."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tersenet.errors import TersenetError
from tersenet.task import Task
from tersenet.train import Train, loop
from tersenet.train.precision import Chosen, faster, for_device


class Clock:
    """Time that passes only while a batch is trained on."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.now, self.seconds = 0.0, seconds
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def once(self, precision: str) -> None:
        self.calls.append(precision)
        self.now += self.seconds[precision]


@pytest.mark.parametrize(
    ("fp32", "bf16", "expected"), [(1.6, 1.0, "bf16-mixed"), (1.05, 1.0, "32-true"), (1.0, 3.0, "32-true")]
)
def test_bf16_is_taken_where_it_pays(fp32: float, bf16: float, expected: str) -> None:
    clock = Clock({"32-true": fp32, "bf16-mixed": bf16})
    found = faster(clock.once, clock)
    assert (found.precision, found.gain) == (expected, pytest.approx(fp32 / bf16))
    assert clock.calls == ["32-true", "bf16-mixed"] * 4, "they take turns, and the first of each is not counted"


def test_slow_batches_are_timed_less_often() -> None:
    clock = Clock({"32-true": 30.0, "bf16-mixed": 10.0})
    faster(clock.once, clock)
    assert len(clock.calls) == 6


@pytest.mark.parametrize("error", [RuntimeError("no kernel for BFloat16"), TersenetError("the loss became nan")])
def test_what_fails_in_bf16_trains_in_fp32(error: Exception) -> None:
    def once(precision: str) -> None:
        if precision == "bf16-mixed":
            raise error

    assert faster(once) == Chosen("32-true")


def test_only_one_process_on_the_cpu_is_timed() -> None:
    cpu = torch.device("cpu")
    assert for_device(cpu, 1) is None
    assert for_device(cpu, 2) == Chosen("32-true")
    assert for_device(torch.device("mps"), 1) == Chosen("32-true")


def net() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 2)]
    return nn.Sequential(*layers)


def data() -> DataLoader[Any]:
    """Shuffles with a generator of its own, whose state a look at the data moves on."""
    x = torch.randn(48, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    own = torch.Generator().manual_seed(5)
    return DataLoader(TensorDataset(x, torch.arange(48) % 2), batch_size=8, shuffle=True, generator=own)


def train(model: nn.Module, precision: Any, source: Any = None, folder: Path | None = None, quiet: bool = True) -> None:
    settings = Train(
        epochs=2, learning_rate=0.05, accelerator="cpu", precision=precision, save_every_s=0.0, warmup=0.2
    )  # fmt: skip
    task = Task(example=torch.zeros(2, 3, 6, 6), train=source or data(), folder=folder, quiet=quiet)
    settings.fit(model, task)


def settled(monkeypatch: pytest.MonkeyPatch, precision: str, gain: float = 1.6) -> list[str]:
    """Tries both precisions for real, and decides whatever the clock says."""
    tried: list[str] = []

    def decide(once: Callable[[str], None]) -> Chosen:
        for each in ("32-true", "bf16-mixed", "32-true"):
            once(each)
            tried.append(each)
        return Chosen(precision, gain)

    monkeypatch.setattr(loop, "faster", decide)
    return tried


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_trial_leaves_no_trace(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = settled(monkeypatch, precision)
    plain, chosen = net(), net()
    train(plain, precision)
    before = torch.random.get_rng_state()
    train(chosen, "auto")
    assert tried, "the trial ran"
    assert torch.equal(before, torch.random.get_rng_state())
    assert same(numbers(plain), numbers(chosen))


class Cut(Exception):
    """Stands for a power cut."""


class Cutting(list[Any]):
    """Batches that are cut at the fifth of each epoch, which the trial does not reach."""

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(super().__iter__()):
            if index == 4:
                raise Cut
            yield batch


def test_a_training_that_goes_on_keeps_its_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settled(monkeypatch, "bf16-mixed")
    plain, cut = net(), net()
    source = list(data())
    train(plain, "bf16-mixed", source)

    with pytest.raises(Cut):
        train(cut, "auto", Cutting(source), tmp_path)
    tried = settled(monkeypatch, "32-true")
    again = net()
    train(again, "auto", source, tmp_path)
    assert not tried, "a second trial could end differently"
    assert same(numbers(plain), numbers(again))
    finished = net()
    train(finished, "auto", source, tmp_path)
    assert not tried
    assert same(numbers(again), numbers(finished))


def test_the_choice_is_said_once_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    settled(monkeypatch, "bf16-mixed", 1.62)
    caplog.set_level(logging.INFO)
    train(net(), "auto", folder=tmp_path, quiet=False)
    said = capsys.readouterr().err
    assert said.count("training in bf16-mixed (1.6x faster here)") == 1
    assert "Mixed Precision (AMP)" not in said + caplog.text, "Fabric says it too"
    assert "1.62" in next(tmp_path.rglob("*.csv")).read_text()
