from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tersenet.bricks.brick import Brick
from tersenet.bricks.shortcut import PadShortcut
from tersenet.errors import SurgeryError
from tersenet.graph.surgery import axes, cut


def picture(model: nn.Module) -> list:
    """Identity of every parameter and buffer, and every attribute that could have changed."""
    tensors = [(name, id(value)) for name, value in (*model.named_parameters(), *model.named_buffers())]
    return tensors + [(path, module.extra_repr(), module.training) for path, module in model.named_modules()]


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4)
    )


GOOD = {"0": {"out": [0, 2, 5]}, "1": {"channel": [0, 2, 5]}, "3": {"in": [0, 2, 5]}}


def test_slices_parameters_buffers_and_attributes() -> None:
    model, before = net(), None
    before = copy.deepcopy(model)
    model[0].weight.requires_grad_(False)
    assert cut(model, GOOD, torch.randn(2, 3, 8, 8)) is model
    index = [0, 2, 5]
    assert torch.equal(model[0].weight, before[0].weight[index])
    assert torch.equal(model[0].bias, before[0].bias[index])
    assert torch.equal(model[1].running_var, before[1].running_var[index])
    assert torch.equal(model[3].weight, before[3].weight[:, index])
    assert torch.equal(model[3].bias, before[3].bias)
    assert (model[0].out_channels, model[1].num_features, model[3].in_channels) == (3, 3, 3)
    assert not model[0].weight.requires_grad
    assert model[3].weight.requires_grad
    assert isinstance(model[0].weight, nn.Parameter)


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({**GOOD, "3": {"in": [0, 2]}}, r"layer '3' \(Conv2d\) says"),  # does not fit what comes before it
        ({"5": {"out": [0, 1]}}, "changes the output"),
        (
            {**GOOD, "3": {"in": [0, 2, 8]}},
            r"layer '3' \(Conv2d\), role 'in': kept indices must be ascending within 0..7",
        ),
        ({**GOOD, "3": {"in": [2, 0, 5]}}, "ascending"),
        ({**GOOD, "3": {"in": [0, 0, 5]}}, "ascending"),
        ({**GOOD, "3": {"in": []}}, "keep at least one"),
        ({**GOOD, "3": {"channel": [0]}}, r"layer '3' \(Conv2d\) cannot lose 'channel'; what it can lose: out, in"),
        ({**GOOD, "2": {"channel": [0]}}, r"layer '2' \(ReLU\) cannot lose 'channel'; what it can lose: nothing"),
        ({**GOOD, "9": {"out": [0]}}, "there is no layer '9'"),
    ],
)
def test_a_failed_cut_leaves_the_model_as_it_was(kept: dict, said: str) -> None:
    model = net()
    before = picture(model)
    values = copy.deepcopy(model.state_dict())
    with pytest.raises(SurgeryError, match=said):
        cut(model, kept, torch.randn(2, 3, 8, 8))
    assert picture(model) == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_a_fault_in_the_middle_of_the_cut_is_rolled_back() -> None:
    """Planted: the last attribute refuses to be set, after everything else was."""

    class Stubborn(nn.Conv2d):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "in_channels" and getattr(self, "in_channels", value) != value:
                raise RuntimeError("no")
            super().__setattr__(name, value)

    model = net()
    model[3] = Stubborn(8, 6, 3)
    before = picture(model)
    with pytest.raises(SurgeryError, match="nothing was cut"):
        cut(model, GOOD)
    assert picture(model) == before


def test_groups_keep_the_same_places() -> None:
    layer = nn.Conv2d(8, 12, 3, groups=2)
    whole = copy.deepcopy(layer)
    root = nn.Sequential(layer)
    with pytest.raises(SurgeryError, match="its 2 groups must keep the same places"):
        cut(root, {"0": {"in": [0, 1, 4, 6]}})
    cut(root, {"0": {"in": [0, 2, 4, 6], "out": [1, 5, 7, 11]}})
    x = torch.randn(2, 8, 5, 5)
    x[:, [1, 3, 5, 7]] = 0
    torch.testing.assert_close(layer(x[:, [0, 2, 4, 6]]), whole(x)[:, [1, 5, 7, 11]])


def test_depthwise_with_a_multiplier_and_the_zeros_of_a_shortcut() -> None:
    layer = nn.Conv2d(4, 12, 3, groups=4)
    whole = copy.deepcopy(layer)
    cut(nn.Sequential(layer), {"0": {"channel": [1, 3]}})
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(layer(x[:, [1, 3]]), whole(x)[:, [3, 4, 5, 9, 10, 11]])
    assert (layer.in_channels, layer.out_channels, layer.groups) == (2, 6, 2)
    short = PadShortcut(2, 4, 4)
    cut(nn.Sequential(short), {"0": {"pad": [0, 3, 4, 5, 7]}})
    assert (short.before, short.after) == (2, 3)
    cut(nn.Sequential(short), {"0": {"pad": []}})
    assert (short.before, short.after) == (0, 0)


def test_a_single_channel_is_no_depthwise_convolution() -> None:
    assert set(axes(nn.Conv2d(1, 1, 3))) == {"out", "in"}
    assert set(axes(nn.Conv2d(1, 8, 3))) == {"out", "in"}
    assert set(axes(nn.Conv2d(8, 8, 3, groups=8))) == {"channel"}


class Scaled(Brick):
    """Looks like a convolution, and has a number more per output."""

    def __init__(self, extra: tuple[int, ...]) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = 4, 6, 1
        self.register_buffer("weight", torch.randn(6, 4, 1, 1))
        self.register_buffer("scale", torch.rand(extra))

    def forward(self, x: Tensor) -> Tensor:
        return torch.conv2d(x, self.weight) * self.scale.view(1, -1, 1, 1)


def test_bricks_are_known_by_their_attributes() -> None:
    brick = Scaled((6,))
    scale = brick.scale
    cut(nn.Sequential(brick), {"0": {"out": [1, 4], "in": [0, 3]}})
    assert torch.equal(brick.scale, scale[[1, 4]])
    assert brick.weight.shape == (2, 2, 1, 1)
    assert "weight" in dict(brick.named_buffers())
    assert axes(Scaled((6, 4))) == {}, "an unknown table cannot be cut by its looks"
    assert axes(Scaled((1,))), "one number for all stays"
