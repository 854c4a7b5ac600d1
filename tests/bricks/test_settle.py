"""Settled models: equal outputs, integers in the state dict, nothing attached, plain operators in a .pt2."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tersenet.bricks.mask import attach
from tersenet.bricks.settle import attached, settle
from tersenet.errors import MadePermanent, NoEffect
from tersenet.graph.capture import export
from tersenet.quantization.quantize import Quantize
from tersenet.rewrite.settle import Settle
from tersenet.task import Task


class Half(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w * (torch.arange(w.numel()).reshape(w.shape) % 2)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TASK = Task(example=X[:2], calibrate=[(X, torch.zeros(4))], quiet=True)


def half_masked() -> nn.Module:
    model = network()
    attach(model[0]).mask.copy_(torch.arange(108).reshape(4, 3, 3, 3) % 2 == 1)
    return model


@pytest.mark.parametrize("activations", ["int8", None])
def test_outputs_stay_equal_and_weights_become_integers(activations: str | None) -> None:
    model, _ = Quantize(activations=activations).run(half_masked(), TASK)
    before = model(X)
    settled, plan = Settle().run(model, TASK)
    assert plan["attached"] == {"0": "parametrized+quantized", "3": "quantized"}
    assert torch.equal(settled(X), before)
    assert attached(settled) == {}
    state = settled.state_dict()
    assert {key for key, value in state.items() if value.dtype == torch.int8} == {"0.weight", "3.weight"}
    assert not bool(state["0.weight"].flatten()[::2].any())


@pytest.mark.parametrize("activations", ["int8", None])
def test_a_parametrization_is_permanent_before_it_is_rounded(activations: str | None) -> None:
    model = network()
    parametrize.register_parametrization(model[0], "weight", Half())
    with pytest.warns(MadePermanent, match="the parametrization Half of 0"):
        model, _ = Quantize(activations=activations).run(model, TASK)
    masked, _ = Quantize(activations=activations).run(half_masked(), TASK)
    before = model(X)
    assert torch.equal(before, masked(X))
    settled, plan = Settle().run(model, TASK)
    assert plan["attached"] == {"0": "quantized", "3": "quantized"}
    assert torch.equal(settled(X), before)
    assert not bool(settled.state_dict()["0.weight"].flatten()[::2].any())


def test_nothing_to_settle_is_said() -> None:
    with pytest.warns(NoEffect):
        Settle().run(network(), TASK)


def test_the_root_itself_can_be_a_brick() -> None:
    model, _ = Quantize(activations=None).run(nn.Linear(4, 3), TASK)
    x = torch.randn(2, 4)
    assert torch.equal(settle(model)(x), model(x))


def test_a_layer_with_two_names_stays_one_layer() -> None:
    layer = nn.Linear(4, 4)
    model, _ = Quantize(activations=None).run(nn.Sequential(layer), TASK)
    model.append(model[0])
    settled = settle(model)
    assert settled[0] is settled[1]
    assert settled[0].weight.dtype == torch.int8


def test_an_exported_program_needs_nothing_of_ours(tmp_path: Path) -> None:
    model = settle(Quantize().run(network(), TASK)[0])
    program = export(model, X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations while it writes
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2")
    assert torch.equal(loaded.module()(X), model(X))
    assert any(value.dtype == torch.int8 for value in loaded.state_dict.values())
    assert all(str(node.target).startswith("aten.") for node in loaded.graph.nodes if node.op == "call_function")
