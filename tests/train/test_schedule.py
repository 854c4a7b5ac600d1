"""The learning rate at every batch, and what decays."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tersenet.train import Train
from tersenet.train.schedule import learning_rate, make_optimizer


def test_the_cosine_is_that_of_torch() -> None:
    settings = Train(learning_rate=0.3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for done in range(20):
        assert learning_rate(settings, done, 20) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        cosine.step()


def test_the_rate_rises_then_stays_or_falls() -> None:
    constant = Train(learning_rate=0.4, schedule="constant", warmup=0.2)
    assert [learning_rate(constant, done, 20) for done in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    cosine = Train(learning_rate=0.4, warmup=0.2)
    assert learning_rate(cosine, 3, 20) == learning_rate(cosine, 4, 20) == 0.4
    assert learning_rate(cosine, 12, 20) == pytest.approx(0.2)
    assert learning_rate(cosine, 19, 20) == pytest.approx(0.2 * (1 + math.cos(math.pi * 15 / 16)))


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW")])
def test_only_weights_decay(name: str, kind: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    settings = Train(optimizer=name, weight_decay=0.1, momentum=0.8)  # type: ignore[arg-type]
    optimizer = make_optimizer(settings, model.parameters())
    assert type(optimizer).__name__ == kind
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [0.1, 0, 0, 0]
    assert optimizer.defaults.get("momentum", optimizer.defaults.get("betas", [0])[0]) == 0.8
    assert len(make_optimizer(settings, [model[1].weight]).param_groups) == 1
