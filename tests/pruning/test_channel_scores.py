"""Each importance finds the channels that it calls unimportant, and the loss agrees where it speaks of the loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersenet.errors import DataError, SettingsError
from tersenet.pruning.channel_scores import FROM_WEIGHTS, SCORES, ranked
from tersenet.pruning.known import known_coupling
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.pruning.subject import Subject
from tersenet.task import Task

GONE = {2, 5, 11}


class Net(nn.Module):
    """Two convolutions with a norm, a bundle without one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(torch.relu(self.conv2(x)).mean(dim=(2, 3)))


@pytest.fixture
def model() -> Any:
    """Three channels of the first bundle are almost nothing in every layer that they live in, and equal filters."""
    torch.manual_seed(0)
    made = Net().eval()
    with torch.no_grad():
        made.bn1.weight.uniform_(0.5, 1.5)
        made.bn1.bias.uniform_(0.1, 0.5)
        for place in GONE:
            made.conv1.weight[place] = 0.01 * made.conv1.weight[0]
            made.bn1.weight[place], made.bn1.bias[place] = 0.01, -0.001
            made.conv2.weight[:, place] *= 0.01
    return made


def task(labels: bool = True) -> Task:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 3, 8, 8, generator=generator)
    y = torch.randint(4, (64,), generator=generator)
    return Task(example=x[:2], train=[(x, y)] if labels else None, calibrate=[x], quiet=True)


@pytest.mark.parametrize("importance", [name for name in SCORES if name not in ("random", "gradient", "fpgm")])
def test_what_is_almost_nothing_goes_first(model: Any, importance: str) -> None:
    plan = PruneChannels(sparsity=0.25, importance=importance, only=("conv1",)).plan(model, task())
    assert set(range(12)) - set(plan["keep"]["conv1"]) == GONE


def test_gradients_look_away_from_size(model: Any) -> None:
    """A channel whose readers are dead has no gradient, however large its filter."""
    with torch.no_grad():
        model.bn1.bias[list(GONE)] = 0.1
        model.conv1.weight[7] *= 10
        model.conv2.weight[:, 7] = 0
        model.bn1.weight[7] = 0
        model.bn1.bias[7] = -1  # never active: no gradient reaches the filter, the norm or the readers
    plan = PruneChannels(sparsity=1 / 12, importance="gradient", only=("conv1",)).plan(model, task())
    assert 7 not in plan["keep"]["conv1"]


def test_the_geometric_median_takes_what_others_can_stand_in_for(model: Any) -> None:
    with torch.no_grad():
        model.conv1.weight.normal_()
        model.conv1.weight[4] = model.conv1.weight.mean(dim=0)
    plan = PruneChannels(sparsity=1 / 12, importance="fpgm", only=("conv1",)).plan(model, task())
    assert 4 not in plan["keep"]["conv1"]


@pytest.mark.parametrize("importance", ["fisher", "taylor"])
def test_the_order_is_that_of_the_true_change(model: Any, importance: str) -> None:
    """With labels drawn from the outputs, Fisher is the curvature of the KL divergence from them."""
    own = task(labels=False)
    with torch.no_grad():
        model.head.weight *= 4
    known = known_coupling(model, own.example)
    bundle = next(bundle for bundle in known.bundles if ("conv1", "out") in bundle.members)
    _, scores = ranked(Subject(model, known, [bundle], own), importance)[0]
    x = torch.cat(list(own.calibrate or []))
    true = []
    with torch.no_grad():
        whole = torch.log_softmax(model(x), dim=1)
        for place in range(12):
            weight = model.conv2.weight[:, place].clone()
            model.conv2.weight[:, place] = 0
            cut = torch.log_softmax(model(x), dim=1)
            true.append(float((whole.exp() * (whole - cut)).sum(dim=1).mean()))
            model.conv2.weight[:, place] = weight
    assert np.corrcoef(np.argsort(np.argsort(true)), np.argsort(np.argsort(scores)))[0, 1] > 0.7


def test_balance_has_weights_at_one_end_and_activations_at_the_other(model: Any) -> None:
    known = known_coupling(model, task().example)
    subject = {balance: Subject(model, known, known.bundles[:1], task(), balance) for balance in (0.0, 0.5, 1.0)}
    sums = model.conv1.weight.detach().double().abs().sum(dim=(1, 2, 3)).numpy()
    np.testing.assert_allclose(ranked(subject[1.0], "weighted")[0][1], sums / sums.mean())
    activation = ranked(subject[0.0], "activation")[0][1]
    np.testing.assert_allclose(ranked(subject[0.0], "weighted")[0][1], activation)
    np.testing.assert_allclose(ranked(subject[0.5], "weighted")[0][1], (sums / sums.mean() + activation) / 2)
    np.testing.assert_allclose(ranked(subject[0.5], "product")[0][1], sums / sums.mean() * activation)


def test_where_there_is_no_norm_l2_serves(model: Any) -> None:
    known = known_coupling(model, task().example)
    subject = Subject(model, known, known.bundles, task())
    norm, other = ranked(subject, "batch_norm")
    np.testing.assert_allclose(norm[1], model.bn1.weight.detach().double().abs().numpy())
    l2 = ranked(subject, "l2")[1][1]
    np.testing.assert_allclose(other[1], l2 / l2.mean() * norm[1].mean())


class Borrowed(nn.Module):
    """A layer that is never called: the forward uses its weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.reader = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.relu(self.first(x)), self.reader.weight, self.reader.bias)


@pytest.mark.parametrize("importance", ["activation", "zeros", "weighted", "taylor", "obs"])
def test_where_no_layer_reads_in_a_call_l2_serves(importance: str) -> None:
    torch.manual_seed(0)
    model, x = Borrowed(), torch.randn(16, 6)
    own = Task(example=x[:2], calibrate=[x], quiet=True)
    plan = PruneChannels(importance=importance).plan(model, own)
    assert plan.get("keep") == PruneChannels(importance="l2").plan(model, own).get("keep")


def widths(model: Any, **settings: Any) -> tuple[int, int]:
    step = PruneChannels(**settings)
    plan = step.plan(model, task())
    keep = plan.get("keep", {})
    return len(keep.get("conv1", range(12))), len(keep.get("conv2", range(8)))


def test_percentiles(model: Any) -> None:
    assert widths(model, percentile=50) == (6, 4)
    assert widths(model, percentile=90) == (2, 1)
    assert widths(model, percentile=0) == (12, 8)
    first, second = widths(model, percentile=50, scope="global")
    assert first + second == 10
    assert widths(model, percentile=90, multiple_of=4) == (4, 4)


def test_thresholds(model: Any) -> None:
    gammas = model.bn1.weight.detach().abs()
    bar = float(gammas.median()) + 1e-6
    assert widths(model, importance="batch_norm", threshold=bar, only=("conv1",)) == (int((gammas >= bar).sum()), 8)
    assert widths(model, threshold=1e9) == (1, 1), "a layer is never emptied"
    assert widths(model, threshold=0.0) == (12, 8)
    assert widths(model, importance="l2", threshold=0.1)[0] == 9


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"percentile": 100}, r"percentile must lie in \[0, 100\), got 100"), ({"balance": 1.5}, "balance"),
     ({"threshold": float("nan")}, "threshold"), ({"percentile": 50, "macs": 0.5}, "macs and percentile"),
     ({"importance": "magic"}, "l1, l2, lamp.*'magic'")],
)  # fmt: skip
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        PruneChannels(**settings)


def test_what_each_needs_of_the_data(model: Any) -> None:
    assert PruneChannels(importance="lamp").data_needed() == "nothing"
    assert PruneChannels(importance="taylor").data_needed() == "inputs"
    bare = Task(example=task().example)
    for importance in SCORES:
        step = PruneChannels(importance=importance)
        if importance in FROM_WEIGHTS:
            assert step.plan(model, bare)
        else:
            with pytest.raises(DataError, match="calibration data"):
                step.plan(model, bare)
