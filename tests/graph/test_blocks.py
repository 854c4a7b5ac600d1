"""Which blocks can be dropped, which cannot and why, and that a drop leaves exactly the shortcut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.errors import SurgeryError
from tersenet.graph.blocks import Blocks, drop, paths_within, residual_blocks
from tersenet.models import build


def blocks(model: nn.Module, size: int = 8, channels: int = 4) -> Blocks:
    return residual_blocks(model.eval(), torch.randn(2, channels, size, size))


def images(channels: int = 4, size: int = 8) -> Tensor:
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(3))


class Residual(nn.Module):
    """act(x + f(x)), where both can be given."""

    def __init__(self, branch: nn.Module, act: Any = None) -> None:
        super().__init__()
        self.branch, self.act = branch, act

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.branch(x)
        return y if self.act is None else self.act(y)


def conv() -> nn.Module:
    return nn.Conv2d(4, 4, 3, padding=1)


# --- reference networks -------------------------------------------------------------------------------------------


def named(stages: dict[str, range]) -> list[str]:
    return [f"{stage}.{i}" for stage, numbers in stages.items() for i in numbers]


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("resnet20", 16, named({"layer1": range(3), "layer2": range(1, 3), "layer3": range(1, 3)})),
        ("resnet18", 32, ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]),
        ("resnet50", 32, named({f"layer{i + 1}": range(1, n) for i, n in enumerate((3, 4, 6, 3))})),
        ("mobilenet_v2", 32, [f"features.{i}" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)]),
    ],
)  # fmt: skip
def test_reference_networks(name: str, size: int, expected: list[str]) -> None:
    model = build(name)
    found = blocks(model, size, 3)
    assert list(found.found) == expected
    assert set(found.found.values()) == {None}, "they all start from what a ReLU gave, or end without one"
    assert "changes the shape" in found.refused["layer2.0" if "resnet" in name else "features.2"]
    drop(model, found.found)
    assert model(torch.randn(2, 3, size, size)).shape[0] == 2


def test_a_block_that_computes_nothing_can_go_without_a_trace() -> None:
    """With branches of zero a block is its shortcut, so dropping it must not move a single bit."""
    model = build("resnet20").eval()
    found = blocks(model, 16, 3).found
    for path in found:
        nn.init.zeros_(model.get_submodule(path).bn2.weight)
    x = images(3, 16)
    expected = model(x)
    assert torch.equal(drop(copy.deepcopy(model), found)(x), expected)


# --- other kinds of blocks ----------------------------------------------------------------------------------------


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = nn.BatchNorm2d(4), conv(), nn.BatchNorm2d(4), conv()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        y += x
        return y


class ConvNeXtLike(nn.Module):
    """Depthwise, LayerNorm over the last dimension, GELU, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(4, 4, 7, padding=3, groups=4), nn.LayerNorm(4)
        self.up, self.down, self.gamma = nn.Linear(4, 8), nn.Linear(8, 4), nn.Parameter(torch.full((4,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class Transformer(nn.Module):
    """Two additions, one block."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.up = conv(), nn.GroupNorm(1, 4), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x))
        return x + F.gelu(self.up(x))


@pytest.mark.parametrize("kind", [PreActivation, ConvNeXtLike, Transformer])
def test_blocks_without_an_activation_become_identities(kind: type[nn.Module]) -> None:
    model = nn.Sequential(conv(), nn.Sequential(kind(), kind()), nn.Flatten(), nn.Linear(256, 3)).eval()
    found = blocks(model)
    assert found.found == {"1.0": None, "1.1": None}
    assert "several blocks (1.0, 1.1)" in found.refused["1"]
    x = images()
    less = drop(copy.deepcopy(model), {"1.1": None})
    assert torch.equal(less(x), model[3](model[2](model[1][0](model[0](x)))))


@pytest.mark.parametrize(
    ("act", "start", "expected"),
    [
        (nn.ReLU(), nn.ReLU(), None),
        (nn.ReLU(inplace=True), conv(), "1.act"),
        (nn.ReLU(), nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 1, 1)), None),
        (nn.ReLU(), nn.Sigmoid(), None),
        (nn.ReLU6(), nn.ReLU(), "1.act"),
        (nn.ReLU6(), nn.ReLU6(), None),
        (nn.ReLU(), nn.ReLU6(), None),
        (nn.GELU(), nn.GELU(), "1.act"),
        (F.relu, conv(), ["ReLU"]),
        (F.relu6, conv(), ["ReLU6"]),
        (lambda x: F.hardtanh(x, -2.0, 3.0), conv(), ["Hardtanh", -2.0, 3.0]),
        (lambda x: F.hardtanh(x, 0.0, 3.0), nn.Sigmoid(), None),
        (lambda x: F.leaky_relu(x, 0.3), conv(), ["LeakyReLU", 0.3]),
        (lambda x: F.gelu(x, approximate="tanh"), conv(), ["GELU", "tanh"]),
        (F.silu, nn.ReLU(), ["SiLU"]),
    ],
)
def test_the_activation_stays_where_the_input_needs_it(act: Any, start: nn.Module, expected: Any) -> None:
    model = nn.Sequential(start, Residual(conv(), act), conv()).eval()
    nn.init.zeros_(model[1].branch.weight)
    nn.init.zeros_(model[1].branch.bias)
    found = blocks(model).found
    assert found == {"1": expected}
    x = 10 * images()
    less = drop(copy.deepcopy(model), found)
    assert torch.equal(less(x), model(x)), "a branch of zeros leaves act(x)"
    assert not getattr(less[1], "inplace", False)


def test_a_sum_may_lose_its_positive_term() -> None:
    """From -1 to 1, and 1 to 2 added: not negative only as long as the first block stays."""
    model = nn.Sequential(nn.Hardtanh(), Residual(nn.Hardtanh(1.0, 2.0)), Residual(conv(), nn.ReLU()), conv())
    assert blocks(model).found == {"1": None, "2": "2.act"}


def test_blocks_in_a_branch_of_a_block_are_its_parts() -> None:
    model = nn.Sequential(conv(), Residual(nn.Sequential(conv(), Residual(conv()))), nn.Sequential(Residual(conv())))
    found = blocks(model)
    assert list(found.found) == ["1", "2.0"]
    assert "part of 1," in found.refused["1.branch.1"]
    assert "nothing but 2.0" in found.refused["2"]


# --- what cannot be dropped ---------------------------------------------------------------------------------------


class LooksInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Residual(conv())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) * self.block.branch.weight.sum()


class TakesTwo(nn.Module):
    class Block(Residual):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return x + scale * self.branch(x)

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block(conv())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, 2.0)


class GivesTwo(nn.Module):
    class Block(Residual):
        def forward(self, x: Tensor) -> Any:
            return x + self.branch(x), None

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block(conv())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)[0]


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Residual(conv())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


class NeverCalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList([conv()])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block[0](x)


class WritesIntoItsInput(nn.Module):
    class Block(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x, inplace=True) + self.branch(x)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = conv(), self.Block(conv())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.first(x))


class ReadsMore(nn.Module):
    class Block(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(x) * self.other[0]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = conv(), self.Block(conv())

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.block.other = [y]
        return self.block(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (LooksInside(), "branch.weight is used outside"),
        (TakesTwo(), "called with something else than one tensor"),
        (GivesTwo(), "gives something else than one tensor"),
        (CalledTwice(), "called more than once"),
        (NeverCalled(), "never called as a whole"),
        (WritesIntoItsInput(), "changes its input in place"),
        (ReadsMore(), "reads something else than its input"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_dropped_says_why(model: nn.Module, reason: str) -> None:
    found = blocks(model)
    assert not found.found
    assert reason in found.refused["block"]


def test_a_projected_shortcut_is_no_identity() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(), conv()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    found = blocks(nn.Sequential(conv(), Projected()))
    assert not found.found
    assert "does not end in the addition of its input" in found.refused["1"]
    assert "single layer (Conv2d)" in found.refused["0"]
    assert "whole model" in found.refused[""]


def test_looking_leaves_the_model_and_chance_alone() -> None:
    model = nn.Sequential(conv(), Residual(nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.5)))).train()
    state, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    residual_blocks(model, images())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("plan", [{"1": None, "9": None}, {"1": None, "0": None}, {"1": "1.branch.no"}, {"": None}])
def test_another_models_plan_is_refused_and_nothing_moves(plan: Any) -> None:
    model = nn.Sequential(conv(), Residual(conv()))
    with pytest.raises(SurgeryError, match="another model's"):
        drop(model, plan)
    assert isinstance(model[1], Residual)


def test_paths_within_are_whole_names() -> None:
    assert paths_within(["a.1.conv", "a.10.conv", "a.1", "b"], ["a.1"]) == ["a.1.conv", "a.1"]
