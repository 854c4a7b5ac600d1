from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from cases import tiny
from tersenet.bricks.mask import masked_layers, stored_weight
from tersenet.findings import collecting
from tersenet.models.cifar_resnet import CifarResNet
from tersenet.pruning import repair as repairing
from tersenet.pruning.drop_blocks import DropBlocks
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.pruning.prune_weights import PruneWeights
from tersenet.pruning.repair import refit, repair
from tersenet.pruning.sound import NOTHING_TO_RECONSTRUCT_ON, UNDONE
from tersenet.task import Task


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = CifarResNet((2, 2, 1)).train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(32, 3, 8, 8))
    return model.eval()


IMAGES = torch.randn(1024, 3, 8, 8, generator=torch.Generator().manual_seed(1))
OTHERS = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def error(a: nn.Module, b: nn.Module, images: Tensor = OTHERS) -> float:
    with torch.no_grad():
        return float((a(images) - b(images)).square().mean())


def thinned(model: nn.Module) -> tuple[nn.Module, dict]:
    step = PruneChannels(sparsity=0.5)
    plan = step.plan(model, Task(example=IMAGES[:2]))
    return step.apply(copy.deepcopy(model), plan), plan["kept"]


def test_later_layers_make_up_for_earlier_ones(model: nn.Module) -> None:
    errors = {}
    for sequential in (False, True):
        cut, kept = thinned(model)
        repair(cut, IMAGES, model, kept, sequential)
        errors[sequential] = error(cut, model)
    bare, kept = thinned(model)
    repair(bare, IMAGES, None, kept)
    assert errors[True] < 0.95 * errors[False]
    assert errors[False] < 0.7 * error(bare, model)


def test_the_norms_compute_the_same_in_training(model: nn.Module) -> None:
    """Their statistics are those of what the layers give now, so a training run starts where the repair stopped."""
    cut, kept = thinned(model)
    repair(cut, IMAGES, model, kept)
    expected = copy.deepcopy(cut)
    cut.train()
    with torch.no_grad():
        trained, evaluated = cut(IMAGES), expected(IMAGES)
    assert float((trained - evaluated).square().mean() / evaluated.var()) < 0.01


def test_a_dropped_block_is_made_up_for(model: nn.Module) -> None:
    cut = copy.deepcopy(model)
    cut.layer1[1] = nn.Identity()  # type: ignore[index, union-attr, operator]
    bare = copy.deepcopy(cut)
    repair(cut, IMAGES, model, {})
    assert error(cut, model) < 0.7 * error(bare, model)
    assert all(not module._forward_hooks for module in model.modules())


def test_nothing_cut_nothing_changed(model: nn.Module) -> None:
    same = copy.deepcopy(model)
    repair(same, IMAGES, model, {})
    assert error(same, model) < 1e-4 * float(model(OTHERS).detach().var())


def test_few_images_do_little_harm(model: nn.Module) -> None:
    """Layers with few rows per unknown stay, unless they lost inputs."""
    cut, kept = thinned(model)
    old = copy.deepcopy(cut.state_dict())
    repair(cut, IMAGES[:16], model, kept)
    new = cut.state_dict()
    same = {key for key in new if torch.equal(new[key], old[key])}
    assert {"layer3.0.conv1.weight", "linear.weight"} <= same
    assert "layer3.0.conv2.weight" not in same


class Adds(nn.Module):
    """The shortcut loses channels too; the layer behind `b` can make up for all that `a` did to the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a1, self.a2 = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)
        self.b = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a2(torch.relu(self.a1(x)))
        return x + self.b(x)


def test_a_sum_is_fitted_and_not_the_layer(model: nn.Module) -> None:
    torch.manual_seed(0)
    whole = Adds().eval()
    cut = copy.deepcopy(whole)
    with torch.no_grad():  # the first block is as if dropped; the second sees x, and must give the sum without x
        cut.a2.weight.zero_()
        cut.a2.bias.zero_()
    cut.a2.weight.requires_grad_(False)
    x = torch.randn(300, 4, 1, 1)
    repair(cut, x, whole, {"b": {"in": [0, 1, 2, 3]}}, ridge=1e-9)
    with torch.no_grad():
        rows = torch.cat([x[:, :, 0, 0], torch.ones(300, 1)], dim=1)
        best = rows @ torch.linalg.lstsq(rows, (whole(x) - x)[:, :, 0, 0]).solution
        assert torch.allclose(cut.b(x)[:, :, 0, 0], best, atol=1e-3)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_and_its_norm_give_the_target(groups: int, affine: bool) -> None:
    torch.manual_seed(0)
    layer, norm = nn.Conv2d(4, 8, 1, groups=groups), nn.BatchNorm2d(8, affine=affine).eval()
    if affine:
        nn.init.uniform_(norm.weight, -2, 2)
        with torch.no_grad():
            norm.weight[0] = 0.0  # nothing can be divided by it
    norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    inputs = torch.randn(500, 4) + 3
    true = nn.Conv2d(4, 8, 1, groups=groups)
    with torch.no_grad():
        target = true(inputs[:, :, None, None])[:, :, 0, 0] - 5
        refit(layer, norm, inputs, target, 1e-9)
        found = norm(layer(inputs[:, :, None, None]))[:, :, 0, 0]
    assert torch.allclose(found, target, atol=1e-4)
    if affine:
        given = layer(inputs[:, :, None, None])[:, :, 0, 0].detach()
        assert torch.allclose(norm.running_mean, given.mean(dim=0), atol=1e-4)  # type: ignore[arg-type]
        assert torch.allclose(norm.running_var, given.var(dim=0), rtol=1e-3)  # type: ignore[arg-type]


def test_masked_layers_are_repaired_under_their_masks(model: nn.Module) -> None:
    """Half of the channels go out of a network of which 60 % are zeros; what is zero stays zero, and what is left makes
    up for the channels."""
    zeros, _ = PruneWeights(sparsity=0.6).run(copy.deepcopy(model), Task(example=IMAGES[:2]))
    cut, kept = thinned(zeros)
    bare = copy.deepcopy(cut)
    repair(bare, IMAGES, None, kept)
    masks = {path: mask.mask.clone() for path, _, mask in masked_layers(cut)}
    assert masks
    under = {path: stored_weight(layer)[~mask.mask].clone() for path, layer, mask in masked_layers(cut)}
    repair(cut, IMAGES, zeros, kept)
    for path, layer, mask in masked_layers(cut):
        assert torch.equal(mask.mask, masks[path])
        assert bool((layer.weight[~mask.mask] == 0).all())
        assert torch.equal(stored_weight(layer)[~mask.mask], under[path])
    assert error(cut, zeros) < 0.6 * error(bare, zeros)


@pytest.mark.parametrize("times", [1, 2])
def test_a_depthwise_layer_behind_a_cut_is_refitted_to_the_channels_that_are_left(times: int) -> None:
    torch.manual_seed(0)

    def unit(inputs: int, outputs: int, groups: int = 1, kernel: int = 3) -> nn.Module:
        layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())

    model = nn.Sequential(
        unit(3, 8),
        unit(8, 16),
        unit(16, 16 * times, 16),
        unit(16 * times, 8, kernel=1),
        nn.Flatten(),
        nn.Linear(512, 4),
    )
    model.eval()
    task = Task(example=IMAGES[:2], calibrate=[IMAGES])
    bare, _ = PruneChannels(sparsity=0.3, refit=False).run(copy.deepcopy(model), task)
    repaired, _ = PruneChannels(sparsity=0.3).run(copy.deepcopy(model), task)
    assert repaired[2][0].weight.shape == bare[2][0].weight.shape == (11 * times, 1, 3, 3)
    assert error(repaired, model) < 0.8 * error(bare, model)


@pytest.mark.parametrize("factor", [1e6, float("nan")])
def test_a_repair_that_blows_up_is_undone_and_said(
    factor: float, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    task = Task(example=images[:2], calibrate=[images], quiet=True)
    step = PruneChannels(sparsity=0.5)
    cut, _ = PruneChannels(sparsity=0.5, refit=False).run(copy.deepcopy(model), task)
    real = repairing.refit

    def blowing(module: nn.Module, *args: object) -> None:
        real(module, *args)
        module.weight.mul_(factor)

    monkeypatch.setattr(repairing, "refit", blowing)
    with collecting() as found:
        repaired, _ = step.run(copy.deepcopy(model), task)
    assert found == [UNDONE]
    state = cut.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in repaired.state_dict().items())
    monkeypatch.setattr(repairing, "refit", real)
    with collecting() as found:
        step.run(copy.deepcopy(model), task)
    assert found == []


def test_outputs_without_floats_are_repaired(model: nn.Module) -> None:
    class Chosen(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).argmax(1)

    chosen = Chosen(model).eval()
    changed, plan = PruneChannels(sparsity=0.5).run(
        copy.deepcopy(chosen), Task(example=IMAGES[:2], calibrate=[IMAGES[:64]], quiet=True)
    )
    assert plan["kept"]
    assert changed(OTHERS).shape == (256,)


@pytest.mark.parametrize("step", [PruneChannels(sparsity=0.5), DropBlocks(count=1)], ids=lambda step: step.name)
def test_without_inputs_nothing_is_reconstructed_and_it_is_said(step: PruneChannels | DropBlocks) -> None:
    bare = Task(example=torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)), quiet=True)
    with collecting() as said:
        found, _ = step.run(tiny(), bare)
    assert said == [NOTHING_TO_RECONSTRUCT_ON]
    with collecting() as said:
        plain, _ = dataclasses.replace(step, refit=False).run(tiny(), bare)
    assert said == []
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), plain.parameters(), strict=True))
