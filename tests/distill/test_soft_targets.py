"""Soft targets against a KL divergence written out by hand, and its gradient against the paper's formula."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from tersenet.distill.soft_targets import SoftTargets, soft_target_loss
from tersenet.errors import ModelError, SettingsError
from tersenet.task import Task
from tersenet.train import Train


def softmax(values: list[float], temperature: float) -> list[float]:
    weights = [math.exp(value / temperature) for value in values]
    return [weight / sum(weights) for weight in weights]


def test_the_loss_is_the_kl_divergence_written_out() -> None:
    teacher, student = [[1.0, -2.0, 0.5], [3.0, 0.0, 0.0]], [[0.0, 1.0, 0.0], [2.0, -1.0, 4.0]]
    for temperature in (1.0, 4.0):
        expected = 0.0
        for v, z in zip(teacher, student, strict=True):
            p, q = softmax(v, temperature), softmax(z, temperature)
            expected += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / len(teacher)
        loss = soft_target_loss(torch.tensor(student), torch.tensor(teacher), temperature)
        assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_that_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    v, z = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    z.requires_grad_(True)
    soft_target_loss(z, v, 3.0).backward()
    expected = 3.0 * ((z / 3).softmax(1) - (v / 3).softmax(1)) / len(v)
    assert torch.allclose(z.grad, expected.detach(), atol=1e-12)  # type: ignore[arg-type]


def test_a_hot_temperature_compares_logits() -> None:
    """Section 2.1 of the paper: for zero-mean logits and large T the loss is the squared distance over 2 K."""
    generator = torch.Generator().manual_seed(0)
    v, z = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    v, z = v - v.mean(1, keepdim=True), z - z.mean(1, keepdim=True)
    expected = (z - v).square().sum(1).mean() / (2 * 7)
    assert float(soft_target_loss(z, v, 1e4)) == pytest.approx(float(expected), rel=1e-3)


def test_maps_of_logits_count_every_pixel() -> None:
    v, z = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 3) for x in (z, v)]  # (N H W, K)
    assert float(soft_target_loss(z, v, 2.0)) == pytest.approx(float(soft_target_loss(flat[0], flat[1], 2.0)), rel=1e-5)


def test_half_precision_is_widened_first() -> None:
    v, z = torch.randn(4, 10), torch.randn(4, 10)
    loss = soft_target_loss(z.bfloat16(), v.bfloat16(), 4.0)
    assert loss.dtype == torch.float32
    assert float(loss) == float(soft_target_loss(z.bfloat16().float(), v.bfloat16().float(), 4.0))


def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3)).eval()
    return teacher, nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.minutes
def test_a_student_learns_from_the_original_without_labels() -> None:
    teacher, student = nets()
    inputs = [torch.randn(32, 6) for _ in range(8)]
    task = Task(example=inputs[0], calibrate=inputs, original=teacher, quiet=True)
    before = copy.deepcopy(teacher.state_dict())
    companions = (SoftTargets(weight=1.0, temperature=2.0),)
    start = soft_target_loss(student(inputs[0]), teacher(inputs[0]), 2.0).item()
    Train(epochs=30, learning_rate=0.1, label_weight=0, companions=companions, accelerator="cpu").fit(student, task)
    assert soft_target_loss(student(inputs[0]), teacher(inputs[0]), 2.0).item() < start / 10
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_it_is_weighted_and_added_to_the_labels() -> None:
    teacher, student = nets()
    batch = (torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    task = Task(example=batch[0], original=teacher)
    outputs = student(batch[0])
    loss = SoftTargets(temperature=2.0, weight=0.3).loss(student, task, batch, outputs)
    assert loss.item() == pytest.approx(0.3 * soft_target_loss(outputs, teacher(batch[0]), 2.0).item(), rel=1e-6)


def test_another_teacher_can_be_given() -> None:
    teacher, student = nets()
    batch = (torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    other = nn.Linear(6, 3)
    outputs = student(batch[0])
    loss = SoftTargets(teacher=other, weight=1.0).loss(
        student, Task(example=batch[0], original=teacher), batch, outputs
    )
    assert loss.item() == pytest.approx(soft_target_loss(outputs, other(batch[0]), 4.0).item(), rel=1e-6)


def test_what_cannot_be_followed_is_said() -> None:
    teacher, student = nets()
    batch = (torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))

    def ask(model: nn.Module = student, outputs: Any = None, **more: Any) -> None:
        task = Task(example=batch[0], **{"original": teacher, **more})
        SoftTargets().loss(model, task, batch, student(batch[0]) if outputs is None else outputs)

    with pytest.raises(SettingsError, match=r"no teacher: task\.original is None"):
        ask(original=None)
    with pytest.raises(SettingsError, match="very model that is trained"):
        ask(model=teacher)
    with pytest.raises(ModelError, match=r"student gives \(4, 2\) and the teacher \(4, 3\)"):
        ask(outputs=torch.zeros(4, 2))
    with pytest.raises(ModelError, match="gives dict"):
        ask(outputs={"logits": torch.zeros(4, 3)})


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": float("nan")}, {"weight": -1.0}])
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=next(iter(settings))):
        SoftTargets(**settings)
