"""What importances read off data, against sample-by-sample loops; and the same from two processes as from one."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersenet.errors import DataError
from tersenet.graph.coupling import coupling
from tersenet.pruning.importance import activations, gate_gradients, weight_gradients
from tersenet.task import Task


class Net(nn.Module):
    """conv, norm, a grouped convolution, flatten, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.grouped = nn.Conv2d(6, 4, 3, groups=2)
        self.hidden, self.head = nn.Linear(4 * 16, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        x = torch.relu(self.grouped(x)).flatten(1)
        return self.head(torch.relu(self.hidden(x)))


def net() -> Any:
    torch.manual_seed(0)
    model = Net().double()
    nn.init.uniform_(model.bn.weight)
    nn.init.normal_(model.bn.bias)
    return model.eval()


def data(sizes: tuple[int, ...] = (9, 8, 3)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(3, (size,), generator=generator),
        )
        for size in sizes
    ]


def task(labels: bool = True, sizes: tuple[int, ...] = (9, 8, 3)) -> Task:
    batches = data(sizes)
    unlabelled = [batch[0] for batch in batches]
    return Task(example=batches[0][0][:2], train=batches if labels else None, calibrate=unlabelled, quiet=True)


def test_activations_are_those_that_the_layer_reads() -> None:
    model = net()
    x = torch.cat([batch[0] for batch in data()])
    with torch.no_grad():
        inner = torch.relu(model.bn(model.conv(x)))
        flat = torch.relu(model.grouped(inner)).flatten(1)
    found = activations(model, task(), ["grouped", "hidden"])
    np.testing.assert_allclose(found.size["grouped"], inner.abs().mean(dim=(0, 2, 3)))
    np.testing.assert_allclose(found.active["grouped"], (inner != 0).double().mean(dim=(0, 2, 3)))
    np.testing.assert_allclose(found.size["hidden"], flat.abs().mean(dim=0))
    assert not any(module._forward_pre_hooks for module in model.modules())


def loss_of(model: Any, x: Tensor, y: Tensor, scale: Tensor | None = None) -> Tensor:
    """The loss of one sample with factors on the channels behind the first norm."""
    inner = torch.relu(model.bn(model.conv(x)))
    inner = inner if scale is None else inner * scale[:, None, None]
    hidden = torch.relu(model.hidden(torch.relu(model.grouped(inner)).flatten(1)))
    return nn.functional.cross_entropy(model.head(hidden), y)


def test_gates_are_factors_on_channels() -> None:
    """Of each sample, against autograd through explicit factors; channels of a group go together, so they add up."""
    model = net()
    known = coupling(model, task().example)
    found = gate_gradients(model, task(), known)
    assert len(found) == 20
    classes = known.slots["grouped", "in"]
    rows = []
    for x, y in data():
        for i in range(len(x)):
            factors = torch.ones(6, dtype=torch.float64, requires_grad=True)
            rows.append(torch.autograd.grad(loss_of(model, x[i : i + 1], y[i : i + 1], factors), factors)[0].numpy())
    expected = np.zeros((20, len(set(classes.tolist()))))
    ids = sorted(set(classes.tolist()))
    for channel, own in enumerate(classes.tolist()):
        expected[:, ids.index(own)] += np.stack(rows)[:, channel]
    np.testing.assert_allclose(np.sort(found[:, ids], axis=0), np.sort(expected, axis=0), atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_weights(frozen: bool) -> None:
    """One sample per batch, so that no two share a backward: exactly the mean over samples."""
    model = net()
    model.conv.weight.requires_grad_(not frozen)
    model.train()
    sizes = (1,) * 6
    found = weight_gradients(model, task(sizes=sizes), ["conv", "head"])
    assert model.training
    assert model.conv.weight.requires_grad is not frozen
    assert model.conv.weight.grad is None
    model.eval()
    model.conv.weight.requires_grad_(True)
    rows = [torch.autograd.grad(loss_of(model, x, y), model.conv.weight)[0] for x, y in data(sizes)]
    torch.testing.assert_close(found["conv"].size, torch.stack(rows).abs().mean(dim=0))
    torch.testing.assert_close(found["conv"].square, torch.stack(rows).square().mean(dim=0))


def test_samples_that_share_a_backward_are_scaled() -> None:
    """Gradients without a mean: the moments of 8 together, scaled, are those of one at a time."""
    torch.manual_seed(0)
    model, batches = nn.Linear(4, 1).double(), []
    for _ in range(60):
        batches.append((torch.randn(64, 4, dtype=torch.float64), torch.zeros(64)))
    task = Task(example=batches[0][0][:2], train=batches, loss=lambda outputs, batch: outputs.mean(), quiet=True)
    found = weight_gradients(model, task, [""], limit=3840)[""]
    x = torch.cat([batch[0] for batch in batches])
    torch.testing.assert_close(found.square[0], x.square().mean(dim=0), rtol=0.15, atol=0)
    torch.testing.assert_close(found.size[0], x.abs().mean(dim=0), rtol=0.1, atol=0)


def test_without_labels_they_are_drawn_from_the_outputs() -> None:
    model = net()
    known = coupling(model, task().example)
    a = gate_gradients(model, task(labels=False), known)
    assert (a == gate_gradients(copy.deepcopy(model), task(labels=False), known)).all()
    other = task(labels=False)
    other.seed = 1
    assert (a != gate_gradients(copy.deepcopy(model), other, known)).any()
    # A model that is certain draws what it says, whose gradient is about zero.
    with torch.no_grad():
        model.head.weight *= 1e7
    assert np.abs(gate_gradients(model, task(labels=False), known)).max() < 1e-3 * np.abs(a).max()


def test_labels_cannot_be_drawn_from_boxes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).double()
    with pytest.raises(DataError, match=r"logits \(N, classes\).*task.train"):
        weight_gradients(model, task(labels=False), ["0"])


def test_what_was_read_is_remembered_until_the_model_changes() -> None:
    model, own = net(), task()
    first = activations(model, own, ["grouped"])
    assert activations(model, own, ["grouped"]) is first
    with torch.no_grad():
        model.conv.weight.mul_(2)
    assert activations(model, own, ["grouped"]) is not first


SUBJECT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import test_importance as subject
rank = int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[3] + "/meet", rank=rank, world_size=2)
torch.save(subject.everything(), f"{sys.argv[3]}/rank{rank}.pt")
"""


def everything() -> dict[str, Tensor]:
    """All that is read off data, and the orders that follow, of one model."""
    from tersenet.pruning.prune_channels import PruneChannels

    model, found = net(), {}
    own = task()
    known = coupling(model, own.example)
    seen = activations(model, own, ["grouped", "hidden"])
    found["size"], found["active"] = torch.from_numpy(seen.size["hidden"]), torch.from_numpy(seen.active["hidden"])
    found["gates"] = torch.from_numpy(gate_gradients(model, own, known))
    found["drawn"] = torch.from_numpy(gate_gradients(model, task(labels=False), known))
    moments = weight_gradients(model, own, ["conv", "head"])
    found["moments"] = torch.cat([moments["conv"].size.flatten(), moments["head"].square.flatten()])
    single, samples = net().float(), [batch[0].float() for batch in data()]
    plain = Task(example=samples[0][:2], calibrate=samples, quiet=True)
    for importance in ("reconstruction", "thinet"):
        kept = PruneChannels(importance=importance, only=("hidden", "grouped")).plan(single, plain)["keep"]
        found[importance] = torch.tensor(kept["hidden"])
    return found


@pytest.mark.minutes
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_two_processes_know_what_one_knows(tmp_path: Path) -> None:
    script = tmp_path / "subject.py"
    script.write_text(SUBJECT, encoding="utf-8")
    here = str(Path(__file__).parent)
    started = [
        subprocess.Popen(
            [sys.executable, str(script), here, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    for process in started:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    one = everything()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert found.keys() == one.keys()
        for key, value in one.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=f"{key} differs from one process")
