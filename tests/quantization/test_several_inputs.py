"""int8 of models with several inputs and outputs: calibrated without anyone saying which output is scored."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersenet import Quantize, Task
from tersenet.errors import DataError


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(1, 8, 3)
        self.head, self.other = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        y = (self.first(x) + self.second(z)).relu().mean((2, 3))
        return self.head(y), self.other(y)


def two_inputs(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, 8, 8, generator=generator), torch.randn(batch, 1, 8, 8, generator=generator)


def task_of(batch: tuple[Tensor, ...]) -> Task:
    return Task(example=two_inputs(2), calibrate=[(batch, torch.zeros(8).long())], quiet=True)  # type: ignore[arg-type]


def test_a_model_of_two_inputs_and_outputs_is_quantized_near_to_itself() -> None:
    torch.manual_seed(0)
    model = Two().eval()
    task = task_of(two_inputs(8))
    step = Quantize()
    plan = json.loads(json.dumps(step.plan(model, task)))
    assert [each["shape"] for each in plan["input"]] == [[2, 3, 8, 8], [2, 1, 8, 8]]
    wanted = model(*two_inputs(5))
    quantized = step.apply(model, plan)
    step.fit(quantized, task)
    for found, expected in zip(quantized(*two_inputs(5)), wanted, strict=True):
        assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_calibration_batches_with_another_number_of_inputs_are_refused() -> None:
    task = task_of(two_inputs(8)[:1])
    with pytest.raises(DataError, match="calibration batch 0 has 1 inputs, the model 2"):
        Quantize().run(Two().eval(), task)


@pytest.mark.parametrize(
    "settings", [{"rounding": "repaired"}, {"correct_bias": True}, {"equalise": True}, {"spare": 1}], ids=str
)
def test_what_looks_at_every_layer_takes_both_inputs(settings: dict[str, Any], capsys: Any) -> None:
    torch.manual_seed(0)
    model, task = Two().eval(), dataclasses.replace(task_of(two_inputs(8)), quiet=False)
    wanted = model(*two_inputs(5))
    quantized, _ = Quantize(**settings).run(model, task)
    for found, expected in zip(quantized(*two_inputs(5)), wanted, strict=True):
        assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()
