"""A budget of parameters: what is left is counted on the cut network itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tersenet import PruneChannels, Task
from tersenet.errors import SettingsError
from tersenet.graph.costs import totals


class Net(nn.Module):
    """Most multiply-adds are in the convolutions, most parameters in the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.hidden, self.last = nn.Linear(32 * 16, 64), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.last(torch.relu(self.hidden(torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))))


@pytest.mark.parametrize("share", [0.6, 0.3])
@pytest.mark.parametrize("scope", ["layer", "global", "sensitivity"])
def test_the_share_of_parameters_is_kept(share: float, scope: str) -> None:
    torch.manual_seed(0)
    model, data = Net().eval(), [torch.randn(16, 3, 16, 16)]
    task = Task(example=data[0][:2], calibrate=data, quiet=True)
    before = totals(model, task.example)
    cut, _ = PruneChannels(params=share, scope=scope).run(model, task)
    left = totals(cut, task.example)
    assert share - 0.1 < left.params / before.params <= share


def test_parameters_are_counted_and_not_multiply_adds() -> None:
    """The linear layer alone has most parameters, and a fortieth of the multiply-adds."""
    torch.manual_seed(0)
    model, task = Net().eval(), Task(example=torch.randn(2, 3, 16, 16), quiet=True)
    cut, _ = PruneChannels(params=0.4, only=("hidden",)).run(model, task)
    assert totals(cut, task.example).params <= 0.4 * 38180


def test_one_budget_at_a_time() -> None:
    with pytest.raises(SettingsError, match="macs and params each say how much"):
        PruneChannels(macs=0.5, params=0.5)
    with pytest.raises(SettingsError, match=r"params must lie in \(0, 1\], got 1.5; it is the share of parameters"):
        PruneChannels(params=1.5)
