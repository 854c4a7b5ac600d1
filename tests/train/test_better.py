"""A training that ends below its start is said, and does not leave worse numbers behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersenet.distill.soft_targets import SoftTargets
from tersenet.findings import collecting
from tersenet.pruning.activation_penalty import ActivationPenalty
from tersenet.task import Task
from tersenet.train import Train
from tersenet.train.better import Standing, is_worse, said, standing
from tersenet.unseen import unseen_batches


def data(samples: int = 256) -> list[tuple[Tensor, Tensor]]:
    """Four classes: which quarter of the image is bright."""
    generator = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(samples, 1, 4, 4, generator=generator)
    y = torch.arange(samples) % 4
    for quarter in range(4):
        row, column = 2 * (quarter // 2), 2 * (quarter % 2)
        x[y == quarter, :, row : row + 2, column : column + 2] += 1.0
    return list(zip(x.split(32), y.split(32), strict=True))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)).eval()


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    model = net()
    Train(epochs=5, learning_rate=0.1).fit(model, task_of(model))
    return model.eval()


def task_of(original: nn.Module, **more: Any) -> Task:
    return Task(example=data()[0][0][:2], **{"train": data(), "original": original, "quiet": True, **more})


def after(model: nn.Module, step: Train, task: Task) -> tuple[nn.Module, list[str]]:
    changed = copy.deepcopy(model)
    with collecting() as findings:
        step.fit(changed, task)
    return changed, findings


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


RUINOUS = {"epochs": 1, "learning_rate": 0.5, "weight_decay": 0.9, "schedule": "constant"}


def test_the_numbers_before_a_ruinous_training_are_kept(trained: nn.Module) -> None:
    task = task_of(trained)
    changed, findings = after(trained, Train(**RUINOUS), task)
    assert same(changed, trained)
    assert "this training ended below its start" in findings[0]
    assert "keep: last" in findings[0]
    changed, findings = after(trained, Train(**RUINOUS, keep="last"), task)
    assert not same(changed, trained)
    assert not findings


def test_the_held_out_set_decides_where_there_is_one(trained: nn.Module) -> None:
    """Its labels are turned here, so that what is worse elsewhere is better for it, and the other way round."""
    turned = [(x, (y + 1) % 4) for x, y in data()]
    changed, findings = after(trained, Train(epochs=3, learning_rate=0.1), task_of(trained, train=turned))
    assert not same(changed, trained)
    assert not findings
    task = task_of(trained, train=turned, validate=data(64))
    changed, findings = after(trained, Train(epochs=3, learning_rate=0.1), task)
    assert same(changed, trained)
    assert "% on the held-out set, 100.00 % before" in findings[0]


def test_a_training_from_random_numbers_is_not_judged() -> None:
    model = net()
    assert standing(model, task_of(model)) is None
    changed, findings = after(model, Train(epochs=2, learning_rate=0.1), task_of(model))
    assert not same(changed, model)
    assert not findings


def test_what_gives_up_accuracy_on_purpose_is_not_judged(trained: nn.Module) -> None:
    penalised = Train(**RUINOUS, companions=(ActivationPenalty(),))
    changed, findings = after(trained, penalised, task_of(trained))
    assert not same(changed, trained)
    assert not findings


class Cut(Exception):
    """Stands for a power cut."""


class Cutting(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(super().__iter__()):
            if index == 5:
                raise Cut
            yield batch


def test_a_training_that_goes_on_is_judged_from_its_first_start(trained: nn.Module, tmp_path: Path) -> None:
    """At the cut it is ruined already; what is kept is what it began with."""
    step, changed = Train(**RUINOUS, save_every_s=0.0), copy.deepcopy(trained)
    cutting = Cutting(data())
    measured: list[Any] = list(cutting[:5])  # what the judge reads comes before the cut
    with pytest.raises(Cut):
        step.fit(changed, task_of(trained, train=cutting, validate=measured, folder=tmp_path))
    again, findings = after(trained, step, task_of(trained, validate=measured, folder=tmp_path))
    assert same(again, trained)
    assert findings
    finished, findings = after(trained, step, task_of(trained, validate=measured, folder=tmp_path))
    assert same(finished, trained), "and so it does when it is called once more"


def test_a_training_that_leaves_the_original_is_no_worse_for_it(trained: nn.Module) -> None:
    """The start is the original itself: every training moves away from it, a good one too."""
    changed, findings = after(trained, Train(epochs=1, learning_rate=0.01), task_of(trained))
    assert not same(changed, trained)
    assert not findings


def test_what_cannot_be_judged_is_left_alone(trained: nn.Module) -> None:
    own = task_of(trained, loss=lambda outputs, batch: outputs.square().mean())
    assert standing(trained, own) is None
    shares = [(x, nn.functional.one_hot(y, 4).float()) for x, y in data()]
    known = standing(trained, task_of(trained, train=shares))
    assert known is not None
    assert known.images == 0
    unlabelled = Task(example=data()[0][0][:2], calibrate=[x for x, _ in data()], original=trained, quiet=True)
    assert standing(trained, unlabelled, labelled=False) == Standing(distance=0.0)
    assert SoftTargets(teacher=net()).trades
    assert not SoftTargets().trades


def test_an_original_that_always_says_the_frequent_class_knows_nothing() -> None:
    constant = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        constant[1].weight.zero_()
        constant[1].bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    mostly = [(x, torch.where(torch.arange(len(y)) % 10 == 0, 1, 0)) for x, y in data()]
    assert standing(constant, task_of(constant, train=mostly)) is None


def test_a_loader_with_chance_of_its_own_gives_the_same_images_again() -> None:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.arange(64.0)[:, None], torch.arange(64)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True, generator=generator
    )
    before = generator.get_state()
    drawn = [torch.cat([batch[1] for batch in unseen_batches(loader, 32, 0)]) for _ in range(2)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], torch.arange(32))
    assert torch.equal(generator.get_state(), before)


def test_labels_decide_where_they_tell_apart_and_the_original_where_not() -> None:
    start = Standing(right=900, images=1000, distance=0.1)
    assert not is_worse(Standing(right=990, images=1000, distance=9.0), start)
    assert is_worse(Standing(right=700, images=1000, distance=0.0), start)
    assert is_worse(Standing(right=902, images=1000, distance=0.2), start)
    assert not is_worse(Standing(right=898, images=1000, distance=0.05), start)
    assert "0.2 nats from the original's outputs, 0.1 before" in said(Standing(None, 902, 1000, 0.2), start)
    assert "70.0 % of 1000 augmented training images right, 90.0 % before" in said(Standing(None, 700, 1000), start)
