"""Masks: exact zeros, gradients, copies that do not disturb one another, graphs, and masks that survive other steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersenet.bricks.mask import Mask, attach, mask_of, masks, only_masked, release, stored_weight
from tersenet.bricks.settle import settle
from tersenet.graph.fold import fold_all
from tersenet.graph.trace import trace
from tersenet.quantization.quantize import Quantize
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.task import Task
from tersenet.train import Train

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    """With a mask of half of the weights on both layers, and norm statistics that are not trivial."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    nn.init.uniform_(model[1].running_var, 0.5, 1.5)
    nn.init.normal_(model[1].running_mean)
    for layer in (model[0], model[4]):
        attach(layer).mask.copy_(torch.rand(layer.weight.shape) < 0.5)
    return model.eval()


def zeros_kept(model: nn.Module, before: nn.Module) -> bool:
    was = {path: mask.mask for path, mask in masks(before).items()}
    now = masks(model)
    return now.keys() == was.keys() and all(
        torch.equal(now[path].mask, was[path]) and not bool(model.get_submodule(path).weight[~was[path]].any())
        for path in was
    )


def test_what_is_masked_is_plus_zero_whatever_lies_under_it() -> None:
    layer = nn.Linear(4, 1)
    mask = attach(layer, "kernel")
    stored_weight(layer).data = torch.tensor([[-1.0, torch.nan, torch.inf, 2.0]])
    mask.mask[0, :3] = False
    assert layer.weight.tolist() == [[0.0, 0.0, 0.0, 2.0]]
    assert not bool(torch.signbit(layer.weight).any())
    assert mask.sparsity == 0.75
    assert Mask(**mask.config()).pattern == "kernel"


@pytest.mark.parametrize("regrowing", [False, True])
def test_the_gradient_reaches_what_is_there_or_everything(regrowing: bool) -> None:
    layer = nn.Linear(3, 2, bias=False)
    mask = attach(layer)
    mask.mask[:, 1] = False
    mask.regrowing = regrowing
    x = torch.randn(5, 3)
    layer(x).sum().backward()
    dense = x.sum(0).expand(2, 3)
    assert torch.allclose(stored_weight(layer).grad, dense if regrowing else dense * mask.mask)


def test_attaching_twice_keeps_the_mask() -> None:
    layer = nn.Linear(3, 2)
    attach(layer).mask[0, 0] = False
    assert attach(layer, "row") is mask_of(layer)
    assert len(layer.parametrizations["weight"]) == 1
    assert layer.weight[0, 0] == 0
    assert mask_of(nn.Linear(2, 2)) is None
    assert only_masked(layer)


def test_copies_and_state_dicts_do_not_disturb_one_another() -> None:
    model = network()
    wanted = model(X)
    twin = copy.deepcopy(model)
    release(twin[0])
    assert type(twin[0]) is nn.Conv2d
    assert torch.equal(model(X), wanted)
    assert torch.equal(twin(X), wanted)
    settled = settle(copy.deepcopy(model))
    assert masks(settled) == {}
    assert torch.equal(settled(X), wanted)
    assert torch.equal(model(X), wanted)
    other = network()
    masks(other)["0"].mask.fill_(True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), wanted)


def test_a_masked_layer_is_one_node_of_the_graph() -> None:
    graph = trace(network(), X)
    assert [str(node.target) for node in graph.graph.nodes if node.op == "call_module"] == list("01234")


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_norm_folds_under_the_mask(kind: type) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(3, 4, 3), nn.BatchNorm2d(4)).eval()
    nn.init.uniform_(model[1].weight, -2, 2)
    nn.init.normal_(model[1].running_mean)
    attach(model[0]).mask.copy_(torch.rand(model[0].weight.shape) < 0.5)
    wanted, before = model(X), copy.deepcopy(model)
    graph = trace(copy.deepcopy(model), X)
    assert fold_all(graph) == ["1"]
    assert torch.allclose(graph(X), wanted, atol=1e-5)
    folded, _ = FoldBatchNorm().run(model, Task(example=X))
    assert torch.allclose(folded(X), wanted, atol=1e-5)
    assert zeros_kept(folded, before)
    # What lies under the mask is scaled as well, so what grows back later fits.
    factor = folded[0].parametrizations.weight.original / before[0].parametrizations.weight.original
    per_channel = factor.transpose(0, 1) if kind is nn.ConvTranspose2d else factor
    assert torch.allclose(per_channel.flatten(1), per_channel.flatten(1)[:, :1].expand(-1, 27), rtol=1e-4)


def test_other_parametrizations_still_keep_norms_away() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)).eval()
    attach(model[0])
    assert fold_all(trace(model, X)) == []


@pytest.mark.parametrize("activations", ["int8", None])
def test_zeros_survive_quantization_and_training_with_it(activations: str | None) -> None:
    before = network()
    data = [(X, torch.arange(8) % 5)]
    task = Task(example=X[:2], train=data, calibrate=data, quiet=True)
    model, _ = Quantize(activations=activations).run(copy.deepcopy(before), task)
    assert zeros_kept(model, before)
    Train(epochs=3, learning_rate=0.1).fit(model, task)
    assert zeros_kept(model, before)
    settled = settle(model)
    for path, mask in masks(before).items():
        integers = settled.get_submodule(path).weight
        assert integers.dtype == torch.int8
        assert not bool(integers[~mask.mask].any())
        assert bool(integers[mask.mask].any())


def test_training_keeps_zeros_and_moves_the_rest() -> None:
    before, model = network(), network()
    task = Task(example=X[:2], train=[(X, torch.arange(8) % 5)], quiet=True)
    Train(epochs=3, learning_rate=0.1).fit(model, task)
    assert zeros_kept(model, before)
    assert not torch.equal(model[0].weight, before[0].weight)
    by_hand = F.linear(model[:4](X), model[4].weight, model[4].bias)
    assert torch.equal(model(X), by_hand)
