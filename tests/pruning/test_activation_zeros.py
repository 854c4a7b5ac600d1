"""Counted zeros against counting every multiply-add by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tersenet.pruning.activation_zeros import activation_zeros, taps, zero_rows
from tersenet.pruning.prune_activations import PruneActivations
from tersenet.task import Task


class Feeds(nn.Module):
    """What the second layer reads is the input, zeros and all."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def task_of(x: torch.Tensor) -> Task:
    return Task(example=x[:2], calibrate=[x[:2], x[2:]], quiet=True)


def test_skipped_multiplications_are_those_of_zeros() -> None:
    x = torch.relu(torch.randn(4, 20, 7, 6) - 0.5)
    x[:, 0:17] *= (torch.rand(4, 1, 7, 6) > 0.5).float()
    x[:, 3] = 0
    layer = nn.Conv2d(20, 5, 3, stride=2, padding=1, bias=False)
    row = activation_zeros(Feeds(layer), task_of(x))[0]
    # Every output position's window, with a mark of what is real.
    real = nn.functional.unfold(torch.ones_like(x), 3, padding=1, stride=2) > 0
    zero = (nn.functional.unfold(x, 3, padding=1, stride=2) == 0) & real
    assert row.skipped == pytest.approx(int(zero.sum()) / int(real.sum()))
    assert row.zeros == pytest.approx(float((x == 0).double().mean()))
    first, last = (x[:, :16] == 0).all(dim=1), (x[:, 16:] == 0).all(dim=1)
    assert row.runs == pytest.approx(float(torch.stack([first, last]).double().mean()))
    assert row.channels == pytest.approx(1 / 20)
    assert row.macs == 20 * 9 * 5 * 4 * 3
    used = taps(layer, x)
    whole = float((16 * first * used).sum() + (4 * last * used).sum())
    assert row.skipped_in_runs == pytest.approx(whole / float(20 * 4 * used.sum()))


def test_linear_layers_have_their_channels_last() -> None:
    x = torch.ones(4, 3, 32)
    x[:, 1, :16] = 0
    row = activation_zeros(Feeds(nn.Linear(32, 2)), task_of(x))[0]
    assert (row.zeros, row.runs, row.channels) == pytest.approx((1 / 6, 1 / 6, 0.0))
    assert row.skipped == row.skipped_in_runs == pytest.approx(1 / 6)


def test_rows_say_before_and_after_and_the_sum_by_work() -> None:
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)
        ).eval()
        task = task_of(torch.randn(8, 3, 8, 8))
    before = activation_zeros(model, task)
    pruned, _ = PruneActivations(sparsity=0.8, share="layer", refit=False).run(model, task)
    rows = zero_rows(before, activation_zeros(pruned, task))
    assert [row["layer"] for row in rows] == ["0", "2", "5", "all layers"]
    assert rows[0]["zeros_after"] == 0.0
    assert rows[0]["at_most"] == 1.0
    for row in rows[1:3]:
        assert row["zeros_before"] < 0.7 < row["zeros_after"]
    total = rows[-1]
    assert total["macs"] == sum(row["macs"] for row in rows[:-1])
    assert total["skippable_macs"] == pytest.approx(sum(row["skippable_macs"] for row in rows[:-1]), abs=3)
    assert total["at_most"] == pytest.approx(total["macs"] / (total["macs"] - total["skippable_macs"]), rel=1e-4)
    assert total["at_most_in_runs"] <= total["at_most"]
