"""The teacher is asked once per batch, in evaluation mode, without gradients, and nothing outlives the batch."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersenet.distill.soft_targets import SoftTargets, soft_target_loss
from tersenet.distill.teacher import teacher_outputs
from tersenet.errors import ModelError, SettingsError
from tersenet.task import Task
from tersenet.train import Train


class Counted(nn.Module):
    """Counts its calls, and refuses eval() as the module of an exported program does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9))
        self.calls: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(self.inner[1].training)
        return self.inner(x)

    def eval(self) -> Any:
        raise NotImplementedError


def test_companions_share_one_answer_per_batch() -> None:
    teacher, student = Counted(), nn.Linear(4, 3)
    data = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(3)]
    companions = (SoftTargets(temperature=2.0), SoftTargets(temperature=8.0), SoftTargets())
    task = Task(example=data[0][0], train=data, original=teacher, quiet=True)
    Train(epochs=2, companions=companions, accelerator="cpu", keep="last").fit(student, task)
    assert teacher.calls == [False] * 6
    assert teacher.training, "its own mode is put back"
    assert teacher.inner[1].training


def test_another_batch_or_a_changed_one_is_asked_again() -> None:
    teacher, student = Counted(), nn.Linear(4, 3)
    task = Task(example=torch.zeros(2, 4), original=teacher)
    x = torch.randn(2, 4)
    first = teacher_outputs(student, task, x)
    assert not first.requires_grad
    assert teacher_outputs(student, task, x) is first
    assert teacher_outputs(student, task, {"label": 3, "input": x}) is first, "known by its tensor, however wrapped"
    x += 1
    assert not torch.equal(teacher_outputs(student, task, x), first)
    teacher_outputs(student, task, x.clone())
    teacher_outputs(student, task, x, teacher=nn.Linear(4, 3))
    assert len(teacher.calls) == 3


def test_the_answer_goes_with_its_batch() -> None:
    task = Task(example=torch.zeros(2, 4), original=Counted())
    x = torch.randn(2, 4)
    answer = weakref.ref(teacher_outputs(nn.Linear(4, 3), task, x))
    gc.collect()
    assert answer() is not None
    del x
    gc.collect()
    assert answer() is None


def test_several_teachers_by_name_teach_the_mean_of_their_logits_and_are_opened_once() -> None:
    nets = {name: nn.Linear(4, 3) for name in ("a.terse", "b.terse")} | {"odd.terse": nn.Linear(4, 2)}
    opened = []

    def open_model(name: str) -> nn.Module:
        opened.append(name)
        return nets[name]

    batch, student = (torch.randn(8, 4), torch.randint(0, 3, (8,))), nn.Linear(4, 3)
    task = Task(example=batch[0], original=nn.Linear(4, 3), open_model=open_model)

    def loss(*names: str, task: Task = task) -> float:
        found = SoftTargets(teachers=names, weight=1.0).loss(student, task, batch, student(batch[0]))
        return found.item()

    both = (nets["a.terse"](batch[0]) + nets["b.terse"](batch[0])) / 2
    assert loss("a.terse", "b.terse") == pytest.approx(soft_target_loss(student(batch[0]), both, 4.0).item())
    alone = soft_target_loss(student(batch[0]), nets["b.terse"](batch[0]), 4.0)
    assert loss("b.terse") == pytest.approx(alone.item())
    assert loss("a.terse", "b.terse") == loss("a.terse", "b.terse")
    assert opened == ["a.terse", "b.terse", "b.terse"]
    with pytest.raises(ModelError, match=r"logits of one shape, got \(8, 3\), \(8, 2\)"):
        loss("a.terse", "odd.terse")
    nets["many.terse"] = nn.LSTM(4, 3)  # a tuple
    with pytest.raises(ModelError, match=r"logits of one shape, got \(8, 3\), tuple"):
        loss("a.terse", "many.terse")
    with pytest.raises(SettingsError, match=r"cannot open teachers by name \(a\.terse\)"):
        loss("a.terse", task=Task(example=batch[0]))
    with pytest.raises(SettingsError, match="not both"):
        SoftTargets(teacher=student, teachers=("a.terse",))
