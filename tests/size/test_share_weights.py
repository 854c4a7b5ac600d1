"""Shared values: what they are, how they learn, and what becomes of zeros and masks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cases import task_for, tiny
from tersenet.bricks.shared import Shared, shared_layers, shared_of
from tersenet.codec import container
from tersenet.errors import ModelError, SettingsError
from tersenet.numerics.codebooks import optimal_codebook
from tersenet.pruning.prune_weights import PruneWeights
from tersenet.rewrite.settle import Settle
from tersenet.size.share_weights import ShareWeights
from tersenet.step import Chain
from tersenet.train import Train


def test_each_layer_has_its_best_values_and_each_weight_the_nearest() -> None:
    model = tiny()
    before = copy.deepcopy(model)
    model, plan = ShareWeights(bits=2).run(model, task_for(model))
    assert plan["shared"]["conv1"] == {"values": 4, "zero": False}
    book = optimal_codebook(before.conv1.weight.detach(), 4)
    distance = (before.conv1.weight.detach()[..., None] - book).abs().amin(-1)
    assert torch.allclose((model.conv1.weight - before.conv1.weight).abs(), distance, atol=1e-6)
    assert all(len(layer.weight.unique()) <= 4 for _, layer, _ in shared_layers(model))


def test_zeros_stay_zero_under_shared_values_and_through_a_training() -> None:
    model = tiny()
    task = task_for(model)
    steps = (PruneWeights(sparsity=0.6), ShareWeights(bits=2), Train(epochs=1, learning_rate=0.01))
    model, _plan = Chain(steps=steps).run(model, task)
    zeros = {}
    for path, layer, shared in shared_layers(model):
        assert (shared.zero, shared.values) == (True, 3)
        assert len(layer.weight.unique()) <= 4
        zeros[path] = int((layer.weight == 0).sum())
        assert zeros[path] >= 0.6 * layer.weight.numel() - 1
    settled = Settle().run(model, task)[0]
    assert not list(shared_layers(settled))
    assert {path: int((settled.get_submodule(path).weight == 0).sum()) for path in zeros} == zeros  # type: ignore[operator,union-attr]


def test_the_gradient_of_a_shared_value_is_the_sum_over_its_members() -> None:
    layer = nn.Linear(6, 5)
    model = nn.Sequential(layer)
    ShareWeights(bits=2).fit(ShareWeights(bits=2).apply(model, {"shared": {"0": {"values": 4, "zero": False}}}), None)  # type: ignore[arg-type]
    shared = shared_of(layer)
    assert shared is not None
    x, pull = torch.randn(3, 6), torch.randn(3, 5)
    (layer(x) * pull).sum().backward()
    weight = pull.T @ x  # the gradient of each weight
    wanted = torch.stack([weight[shared.codes == k].sum() for k in range(4)])
    torch.testing.assert_close(shared.book.grad, wanted)
    stored = layer.parametrizations["weight"].original  # type: ignore[index,union-attr]
    assert stored.grad is None


def test_a_zero_that_is_held_does_not_learn() -> None:
    shared = Shared((4,), 2, zero=True)
    with torch.no_grad():
        shared.book.copy_(torch.tensor([-1.0, 2.0]))
    shared.codes.copy_(torch.tensor([0, 1, 2, 0]))
    out = shared(torch.randn(4))
    assert out.tolist() == [0.0, -1.0, 2.0, 0.0]
    out.sum().backward()
    assert shared.book.grad is not None
    assert shared.book.grad.tolist() == [1.0, 1.0]


def test_the_file_holds_a_codebook_and_is_smaller(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = tiny()
    task = task_for(model)
    made = Chain(steps=(ShareWeights(bits=3), Settle())).run(model, task)[0]
    container.write(tmp_path / "a", {}, dict(made.state_dict()))
    rows = container.inspect(tmp_path / "a").rows()
    weights = [row for row in rows if len(row["shape"]) == 4 and row["decoded_bytes"] > 512]
    assert weights
    assert all(row["codec"] in ("codebook", "grid") and row["bytes"] < row["decoded_bytes"] / 4 for row in weights)


def test_what_is_refused() -> None:
    for bits in (0, 9, True):
        with pytest.raises(SettingsError, match=r"bits must lie in 1\.\.8"):
            ShareWeights(bits=bits)
    model = tiny()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match="conv1"):
        ShareWeights().run(model, task_for(model))
