from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.errors import NoEffect, SettingsError, SurgeryError
from tersenet.graph.capture import export
from tersenet.graph.costs import totals
from tersenet.models import build, reference
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.task import Task, score_model

SHARED = Path(__file__).parents[3] / "shared" / "data"


class Block(nn.Module):
    """conv, norm, conv, norm, and a residual addition."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.block1, self.block2 = Block(12, 16), Block(12, 20)
        self.hidden, self.head = nn.Linear(12, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(torch.relu(self.bn(self.stem(x)))))
        return self.head(torch.relu(self.hidden(F.adaptive_avg_pool2d(x, 1).flatten(1))))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def task(model: nn.Module | None = None, data: bool = True) -> Task:
    batches = [
        (torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(i)), torch.zeros(32)) for i in range(4)
    ]
    return Task(example=batches[0][0][:2], calibrate=batches if data else None, original=model, quiet=True)


def test_a_share_of_every_layer_goes_and_the_head_stays(model: nn.Module) -> None:
    plan = PruneChannels(sparsity=0.5).plan(model, task())
    cut = PruneChannels().apply(model, json.loads(json.dumps(plan)))
    assert (cut.block1.conv1.out_channels, cut.block2.conv1.out_channels, cut.hidden.out_features) == (8, 10, 5)
    assert (cut.stem.out_channels, cut.head.out_features) == (12, 5)
    assert cut(torch.randn(3, 3, 8, 8)).shape == (3, 5)
    assert export(cut, torch.randn(2, 3, 8, 8))


def test_residual_channels_go_when_asked_for(model: nn.Module) -> None:
    plan = PruneChannels(sparsity=0.5, residual=True).plan(model, task())
    cut = PruneChannels().apply(model, plan)
    kept = plan["kept"]["stem"]["out"]
    assert len(kept) == 6
    assert plan["kept"]["block1.conv2"]["out"] == plan["kept"]["hidden"]["in"] == kept
    assert cut(torch.randn(3, 3, 8, 8)).shape == (3, 5)


@pytest.mark.parametrize(
    ("sparsity", "multiple", "expected"),
    [(0.5, 8, (8, 8, 8)), (0.3, 4, (12, 16, 8)), (0.9, 8, (8, 8, 8)), (0.99, 1, (1, 1, 1)), (0.0, 8, (16, 20, 10)),
     (0.5, 32, (16, 20, 10)), (0.1, 8, (16, 16, 8)), (0.6, 3, (6, 9, 3))],
)  # fmt: skip
def test_multiples(model: nn.Module, sparsity: float, multiple: int, expected: tuple[int, ...]) -> None:
    step = PruneChannels(sparsity=sparsity, multiple_of=multiple)
    cut = step.apply(model, step.plan(model, task()))
    assert (cut.block1.conv1.out_channels, cut.block2.conv1.out_channels, cut.hidden.out_features) == expected


@pytest.mark.parametrize("importance", ["l1", "l2"])
def test_the_smallest_go(model: nn.Module, importance: str) -> None:
    with torch.no_grad():
        for place in (3, 7, 11):
            model.block1.conv1.weight[place] *= 0.01
            model.block1.conv2.weight[:, place] *= 0.01
    plan = PruneChannels(sparsity=3 / 16, importance=importance, only=("block1.conv1",)).plan(model, task())
    assert set(range(16)) - set(plan["kept"]["block1.conv1"]["out"]) == {3, 7, 11}
    assert set(plan["kept"]) == {"block1.conv1", "block1.bn1", "block1.conv2"}


def test_random_follows_the_seed(model: nn.Module) -> None:
    step, a, b = PruneChannels(importance="random"), task(), task()
    b.seed = 1
    assert step.plan(model, a) == step.plan(model, a)
    assert step.plan(model, a) != step.plan(model, b)


def test_global_takes_from_where_it_hurts_least(model: nn.Module) -> None:
    """Scores are relative to a layer's mean, so a layer of two kinds of channels loses the small ones."""
    with torch.no_grad():
        for layer, dim in ((model.block1.conv1, 0), (model.block1.bn1, 0), (model.block1.conv2, 1)):
            layer.weight.transpose(0, dim)[:8] *= 0.001
    step = PruneChannels(sparsity=8 / 46, scope="global")
    cut = step.apply(model, step.plan(model, task()))
    assert (cut.block1.conv1.out_channels, cut.block2.conv1.out_channels, cut.hidden.out_features) == (8, 20, 10)


def test_only_and_skip(model: nn.Module) -> None:
    assert PruneChannels(only=("block1.*",)).plan(model, task())["kept"].keys() == {
        "block1.conv1", "block1.bn1", "block1.conv2",
    }  # fmt: skip
    assert "hidden" not in PruneChannels(skip=("linear",)).plan(model, task())["kept"]
    with pytest.warns(NoEffect):
        assert PruneChannels(skip=("conv2d", "linear")).run(model, task())[1] == {}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_budget_of_multiply_adds(model: nn.Module, scope: str) -> None:
    before = totals(model, task().example).macs
    step = PruneChannels(macs=0.5, scope=scope)
    cut = step.apply(copy.deepcopy(model), step.plan(model, task()))
    after = totals(cut, task().example).macs
    assert 0.4 * before <= after <= 0.5 * before


def test_a_budget_out_of_reach(model: nn.Module) -> None:
    with pytest.raises(SettingsError, match=r"macs 0.01 cannot be reached .*: the least is 0\.\d+; .* residual"):
        PruneChannels(macs=0.01).plan(model, task())


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"sparsity": 1.0}, "sparsity"), ({"sparsity": -0.1}, "sparsity"), ({"importance": "l3"}, "l1, l2"),
     ({"scope": "model"}, "scope"), ({"multiple_of": 0}, "multiple_of"), ({"macs": 0.0}, "macs")],
)  # fmt: skip
def test_bad_settings(settings: dict, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        PruneChannels(**settings)


def test_another_models_plan_is_refused(model: nn.Module) -> None:
    plan = PruneChannels().plan(model, task())
    other = Small()
    other.block2 = Block(12, 8)
    with pytest.raises(SurgeryError, match=r"block2\.conv1"):
        PruneChannels().apply(other, plan)
    assert other.block1.conv1.out_channels == 16


def error(a: nn.Module, b: nn.Module) -> float:
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        return float((a(x) - b(x)).square().mean())


def test_the_repair_brings_the_outputs_back(model: nn.Module) -> None:
    whole = copy.deepcopy(model)
    with torch.no_grad():  # statistics as training leaves them
        whole.train()
        for batch in task().calibrate * 20:
            whole(batch[0])
        whole.eval()
    bare, plan = PruneChannels(refit=False).run(copy.deepcopy(whole), task())
    repaired, same = PruneChannels().run(copy.deepcopy(whole), task())
    norms = PruneChannels().apply(copy.deepcopy(whole), plan)
    PruneChannels().fit(norms, task(None))
    assert same == plan
    assert error(repaired, whole) < 0.5 * error(bare, whole)
    assert error(repaired, whole) < error(norms, whole)
    assert all(not module._forward_hooks for module in whole.modules())


def test_lost_channels_that_were_copies_are_made_up_for(model: nn.Module) -> None:
    """Every channel twice: one of each pair can go, and least squares then give the same outputs."""
    with torch.no_grad():
        conv, norm, reader = model.block1.conv1, model.block1.bn1, model.block1.conv2
        conv.weight[8:] = conv.weight[:8]
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            value[8:] = value[:8]
        reader.weight[:, :8] *= 0.1  # so that these are the smaller ones
    whole = copy.deepcopy(model)
    cut, plan = PruneChannels(only=("block1.conv1",)).run(model, task())
    assert plan["kept"]["block1.conv1"]["out"] == list(range(8, 16))
    x = task().calibrate[0][0]
    a, b = torch.relu(whole.bn(whole.stem(x))), torch.relu(cut.bn(cut.stem(x)))
    inner = [m.block1.conv2(torch.relu(m.block1.bn1(m.block1.conv1(v)))) for m, v in ((whole, a), (cut, b))]
    assert float((inner[0] - inner[1]).detach().abs().max() / inner[0].detach().abs().max()) < 0.01


def test_fit_needs_data_and_changes_no_structure(model: nn.Module) -> None:
    cut, _ = PruneChannels(refit=False).run(copy.deepcopy(model), task())
    before = copy.deepcopy(cut.state_dict())
    PruneChannels().fit(cut, task(model, data=False))
    assert all(torch.equal(value, before[key]) for key, value in cut.state_dict().items())
    cut.train()
    PruneChannels().fit(cut, task(model))
    assert cut.training
    assert cut.block1.bn1.training
    assert {key: value.shape for key, value in cut.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert any(not torch.equal(value, before[key]) for key, value in cut.state_dict().items())
    again = copy.deepcopy(cut.state_dict())
    other, _ = PruneChannels().run(copy.deepcopy(model), task())
    assert all(torch.equal(value, again[key]) for key, value in other.state_dict().items()), "no chance in it"


@pytest.mark.parametrize(
    ("name", "residual"),
    [("digits", True), ("resnet20", True), ("resnet18", True), ("resnet50", False), ("mobilenet_v2", False),
     ("vgg16_bn_cifar", False)],
)  # fmt: skip
@pytest.mark.minutes
def test_reference_models(name: str, residual: bool) -> None:
    torch.manual_seed(0)
    model = build(name).eval()
    prepared = reference(name).preparation
    size = (64, 64) if prepared.size[0] > 64 else prepared.size
    example = torch.randn(2, prepared.channels, *size)
    classes = model(example).shape
    step = PruneChannels(sparsity=0.5, residual=residual)
    plan = step.plan(model, Task(example=example))
    params = sum(p.numel() for p in model.parameters())
    cut = step.apply(model, plan)
    assert cut(example).shape == classes
    assert sum(p.numel() for p in cut.parameters()) < 0.85 * params
    exported = export(cut, example).module()
    torch.testing.assert_close(exported(example), cut(example), rtol=1e-4, atol=1e-4)


@pytest.mark.minutes
def test_resnet20_on_cifar() -> None:
    """Half of each block's inner channels, no training: far above the 10 % of chance and of the cut without repair."""
    weights, data = SHARED / "weights" / "cifar10_resnet20.safetensors", SHARED / "cifar10"
    if not weights.exists() or not data.exists():
        pytest.skip("../shared/data/weights and ../shared/data/cifar10 are not here")
    pq, image = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("PIL.Image")
    import io

    from safetensors.torch import load_file

    def images(split: str, count: int) -> tuple[Tensor, Tensor]:
        rows = next(pq.ParquetFile(data / f"{split}.parquet").iter_batches(count)).to_pydict()
        pixels = np.stack([np.asarray(image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in rows["img"]])
        prepared = reference("resnet20").preparation
        x = (torch.from_numpy(pixels).float() / 255 - torch.tensor(prepared.mean)) / torch.tensor(prepared.std)
        return x.permute(0, 3, 1, 2).contiguous(), torch.tensor(rows["label"])

    model = build("resnet20").eval()
    model.load_state_dict(load_file(weights))
    calibrate, test = images("train", 256), images("test", 500)
    task = Task(example=calibrate[0][:2], calibrate=[calibrate], test=[test], original=model, quiet=True)
    cut, _ = PruneChannels(sparsity=0.5).run(model, task)
    assert score_model(cut, task, task.test).value > 0.7
