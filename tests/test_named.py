"""Layers as settings name them: what is a layer and what only holds some, also with masks attached."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tersenet.bricks.mask import attach
from tersenet.errors import SettingsError
from tersenet.left_alone import weights_of
from tersenet.named import check_names, is_layer
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.pruning.prune_weights import PruneWeights
from tersenet.step import Chain, Step
from tersenet.task import Task


class Scaled(nn.Module):
    """A block with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(4, 4, 1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.body(x)


class NormAndActivation(nn.BatchNorm2d):
    def __init__(self) -> None:
        super().__init__(4, affine=False)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def net() -> nn.Sequential:
    """Layers without biases, so that a mask leaves them no parameter of their own."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), NormAndActivation(), Scaled(), nn.Flatten(), nn.Linear(4 * 16, 10, bias=False)
    )


TASK = Task(example=torch.zeros(2, 3, 6, 6))


def masked() -> nn.Sequential:
    model = net()
    attach(model[0])
    parametrizations.weight_norm(model[4])
    return model


@pytest.mark.parametrize("make", [net, masked])
@pytest.mark.parametrize("pattern", ["0", "4", "1", "2.body", "conv2d", "Linear", "2.*", "?"])
def test_a_layer_is_one_with_masks_and_without(make: type[nn.Sequential], pattern: str) -> None:
    assert check_names(PruneWeights(skip=(pattern,)), make()) == []


@pytest.mark.parametrize("make", [net, masked])
@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("2", r"'2', which holds layers and is none itself; write '2\.\*'"),
        ("Scaled", "holds layers and is none itself; name the layers in it"),
        ("0.parametrizations.weight", "no layer of this model is called that"),
        ("Mask", "no layer of this model is called that or is of that type"),
        ("Linea", r"did you mean Linear\?"),
    ],
)
def test_what_is_no_layer_is_refused_with_masks_and_without(make: type[nn.Sequential], pattern: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        check_names(PruneWeights(skip=(pattern,)), make())


def test_an_attention_is_a_layer_and_a_block_with_a_parameter_is_none() -> None:
    assert is_layer(nn.MultiheadAttention(8, 2))
    assert not is_layer(Scaled())
    assert not is_layer(nn.TransformerEncoderLayer(8, 2))


def test_weights_are_the_layers_own_with_masks_and_without() -> None:
    assert weights_of(masked()) == {**weights_of(net()), "4": 640 + 10}  # the sizes of rows of weight norm


@pytest.mark.parametrize(
    "step", [PruneChannels(sparsity=0.5, skip=("0",)), PruneWeights(sparsity=0.5, only=("0", "linear"))]
)
def test_a_step_names_layers_that_an_earlier_one_masked(step: Step) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.Flatten(), nn.Linear(32, 10)
    )
    _, plan = Chain(steps=(PruneWeights(sparsity=0.3), step)).run(model, TASK)
    assert [entry["step"] for entry in plan["steps"]] == ["prune_weights", step.name]
