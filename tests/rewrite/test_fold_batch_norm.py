"""Folded models against the originals, on every kind of layer."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from tersenet.errors import NoEffect
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.task import Task

X = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def lively(model: nn.Module) -> nn.Module:
    """Norms with statistics, scales and shifts that are not the defaults."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


MODELS = {
    "plain": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)),
    "with a bias": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
    "without affine": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)),
    "transposed grouped": lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 5), nn.BatchNorm1d(5)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_fold_is_exact(name: str) -> None:
    model = lively(MODELS[name]())
    before = model(X)
    fresh = MODELS[name]()
    folded, plan = FoldBatchNorm().run(model, Task(example=X))
    assert plan
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    torch.testing.assert_close(folded(X), before, rtol=1e-5, atol=1e-5)
    replayed = FoldBatchNorm().apply(fresh, json.loads(json.dumps(plan)))
    replayed.load_state_dict(folded.state_dict())
    assert torch.equal(replayed.eval()(X), folded(X))


class Shared(nn.Module):
    """Nothing to fold: a convolution called twice, one with another user, and a norm in front."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.forked = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.twice(self.twice(self.first(x))))
        forked = self.forked(x)
        return self.other(forked) + forked


def test_what_cannot_be_folded_is_left_and_not_listed() -> None:
    model = lively(Shared())
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(NoEffect):
        folded, plan = FoldBatchNorm().run(model, Task(example=X))
    assert plan == {}
    assert folded is model
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_planning_changes_nothing_and_skip_is_followed() -> None:
    model = lively(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3), nn.BatchNorm2d(2)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert FoldBatchNorm(skip=("0",)).plan(model, Task(example=X)) == {"pairs": [["2", "3"]]}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
