"""Graphs that broke other pruners, from their issue trackers: cut rightly, or left alone with a reason; never broken.

In brackets what broke where: TP is Torch-Pruning, NNI Microsoft's, AIMET Qualcomm's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from yolo import Yolo

from tersenet.graph.coupling import Coupling, coupling
from tersenet.graph.recut import recut


class Net(nn.Module):
    """Layers by name and a forward as a function, so that a case is one line."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Pair(Net):
    """The same of two inputs."""

    def forward(self, x: Tensor, z: Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x, z)


def conv(inputs: int, outputs: int, size: int = 3, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **kwargs)


def pool(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def tied() -> Net:
    net = Net(
        lambda m, x: m.fc(pool(m.c3(torch.relu(m.c2(torch.relu(m.c1(x))))))),
        c1=conv(3, 8), c2=conv(8, 8), c3=conv(8, 8), fc=nn.Linear(8, 4),
    )  # fmt: skip
    net.c3.weight = net.c2.weight
    return net


def concat_split(m: Net, x: Tensor) -> Tensor:
    """[only_train_once #50] Two branches are joined, then taken apart again elsewhere."""
    y = torch.cat([m.c1(x), m.c2(x)], 1)
    a, b = torch.split(y, [4, 10], 1)
    return m.fc(torch.cat([pool(m.c3(a)), pool(m.c4(b))], 1))


def attention(m: Net, x: Tensor) -> Tensor:
    """Heads with every size written out, as in timm."""
    t = m.embed(x).flatten(2).transpose(1, 2)
    n, length, width = t.shape
    q, k, v = m.qkv(t).reshape(n, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q * (width // 4) ** -0.5) @ k.transpose(-2, -1)
    t = t + m.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width))
    return m.fc(t.mean(1))


def unet(m: Net, x: Tensor) -> Tensor:
    a = torch.relu(m.down(x))
    b = m.up(torch.relu(m.deep(a)))
    return m.out(torch.cat([a, F.interpolate(b, size=a.shape[2:])], 1))


IMAGE = (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)),)
TWO = (*IMAGE, torch.randn(2, 5, generator=torch.Generator().manual_seed(2)))

# name -> (network, inputs, layers that must become smaller)
GRAPHS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], str]] = {
    "one_channel_is_no_depthwise": (lambda: Net(  # [TP #179, #126]
        lambda m, x: m.fc(pool(torch.relu(m.c3(torch.relu(m.c2(m.c1(x))))))),
        c1=conv(3, 1), c2=conv(1, 8), c3=conv(8, 6), fc=nn.Linear(6, 4)), IMAGE, "c2 c3"),
    "one_channel_attention": (lambda: Net(
        lambda m, x: m.fc(pool((y := m.c1(x)) * torch.sigmoid(m.gate(y)))),
        c1=conv(3, 8), gate=conv(8, 1), fc=nn.Linear(8, 4)), IMAGE, "c1"),
    "concat_split": (lambda: Net(concat_split, c1=conv(3, 8), c2=conv(3, 6), c3=conv(4, 6), c4=conv(10, 6),
                                 fc=nn.Linear(12, 4)), IMAGE, "c1 c2 c3 c4"),
    "concat_of_concats": (lambda: Net(  # [TP #146, #188, #481]
        lambda m, x: m.fc(pool(m.c3(torch.cat([y := torch.cat([m.c1(x), m.c2(x)], 1), m.dw(y), x], 1)))),
        c1=conv(3, 8), c2=conv(3, 6), dw=conv(14, 14, groups=14), c3=conv(31, 6), fc=nn.Linear(6, 4)),
        IMAGE, "c1 c2 dw c3"),
    "written_view": (lambda: Net(
        lambda m, x: m.fc(m.c1(x).view(-1, 8 * 16 * 16)), c1=conv(3, 8), fc=nn.Linear(2048, 4)), IMAGE, "c1"),
    "written_groups": (lambda: Net(
        lambda m, x: m.fc(pool(m.c1(x).view(2, 2, 4, 16, 16).transpose(1, 2).reshape(2, 8, 16, 16))),
        c1=conv(3, 8), fc=nn.Linear(8, 4)), IMAGE, "c1"),
    "module_used_twice": (lambda: Net(  # [AIMET #3057]
        lambda m, x: m.fc(pool(m.c2(torch.relu(m.c2(torch.relu(m.c1(x))))))),
        c1=conv(3, 8), c2=conv(8, 8), fc=nn.Linear(8, 4)), IMAGE, "c1 c2"),
    "activation_used_everywhere": (lambda: Net(
        lambda m, x: m.fc(pool(m.act(m.c2(m.act(m.c1(x)))))),
        c1=conv(3, 8), c2=conv(8, 6), act=nn.Hardswish(), fc=nn.Linear(6, 4)), IMAGE, "c1 c2"),
    "two_levels_one_head": (lambda: Net(
        lambda m, x: (m.head(torch.relu(m.tower(y := m.c1(x)))), m.head(torch.relu(m.tower(m.c2(y))))),
        c1=conv(3, 8), c2=conv(8, 8, stride=2), tower=conv(8, 6), head=conv(6, 4)), IMAGE, "c1 c2 tower"),
    "tied_weights": (tied, IMAGE, ""),
    "transposed": (lambda: Net(
        lambda m, x: m.out(torch.relu(m.up(torch.relu(m.c1(x))))),
        c1=conv(3, 8, stride=2), up=nn.ConvTranspose2d(8, 6, 2, 2), out=conv(6, 2)), IMAGE, "c1 up"),
    "unet": (lambda: Net(unet, down=conv(3, 8), deep=conv(8, 12, stride=2), up=nn.ConvTranspose2d(12, 6, 2, 2),
                         out=conv(14, 2)), IMAGE, "down deep up"),
    "several_inputs": (lambda: Pair(
        lambda m, x, z: m.fc(torch.cat([pool(m.c1(x)) + m.l1(z), m.l2(z)], 1)),
        c1=conv(3, 8), l1=nn.Linear(5, 8), l2=nn.Linear(5, 6), fc=nn.Linear(14, 4)), TWO, "c1 l1 l2"),
    "several_outputs": (lambda: Net(
        lambda m, x: {"class": m.fc(pool(y := torch.relu(m.c1(x)))), "mask": m.mask(y)},
        c1=conv(3, 8), fc=nn.Linear(8, 4), mask=conv(8, 2)), IMAGE, "c1"),
    "a_feature_is_an_output": (lambda: Net(
        lambda m, x: (m.fc(pool(m.c2(y := m.c1(x)))), y), c1=conv(3, 8), c2=conv(8, 6), fc=nn.Linear(6, 4)),
        IMAGE, "c2"),
    "hardswish": (lambda: Net(  # [NNI #5172]
        lambda m, x: m.fc(pool(m.s(m.c2(F.hardswish(m.c1(x)))))),
        c1=conv(3, 8), c2=conv(8, 6), s=nn.Hardsigmoid(), fc=nn.Linear(6, 4)), IMAGE, "c1 c2"),
    "upsample": (lambda: Net(  # [NNI #4905]
        lambda m, x: m.out(torch.cat([m.up(m.c2(y := m.c1(x))), y], 1)),
        c1=conv(3, 8), c2=conv(8, 6, stride=2), up=nn.Upsample(scale_factor=2, mode="bilinear"), out=conv(14, 2)),
        IMAGE, "c1 c2"),
    "groups": (lambda: Net(  # [NNI #5152, #5298, #2666]
        lambda m, x: m.fc(pool(m.c3(torch.relu(m.c2(torch.relu(m.c1(x))))))),
        c1=conv(3, 12), c2=conv(12, 12, groups=4), c3=conv(12, 6, groups=2), fc=nn.Linear(6, 4)), IMAGE, "c1 c2"),
    "depthwise_then_residual": (lambda: Net(  # [NNI #3318]
        lambda m, x: m.fc(pool((y := m.c1(x)) + m.c3(F.relu6(m.dw(F.relu6(m.c2(y))))))),
        c1=conv(3, 8), c2=conv(8, 16, 1), dw=conv(16, 16, groups=16), c3=conv(16, 8, 1), fc=nn.Linear(8, 4)),
        IMAGE, "c1 c2 dw c3"),
    "attention": (lambda: Net(attention, embed=nn.Conv2d(3, 16, 4, 4), qkv=nn.Linear(16, 48), proj=nn.Linear(16, 16),
                              fc=nn.Linear(16, 4)), IMAGE, "embed qkv proj"),
    "branch_on_a_size": (lambda: Net(  # [MCT #1299]
        lambda m, x: m.fc(pool(m.c2(y) if (y := m.c1(x)).shape[1] > 4 else y)),
        c1=conv(3, 8), c2=conv(8, 8), fc=nn.Linear(8, 4)), IMAGE, "c1 c2"),
    "dead_branch": (lambda: Net(
        lambda m, x: (m.c2(y := m.c1(x)), m.fc(pool(y)))[1], c1=conv(3, 8), c2=conv(8, 6), fc=nn.Linear(8, 4)),
        IMAGE, ""),
    "yolo": (lambda: Yolo(8, 5, 4), (torch.randn(1, 3, 64, 64),), "p4.1.first.conv up3.last.conv boxes.0.0.conv"),
}  # fmt: skip


def settled(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def zeroed(model: nn.Module, known: Coupling, removed: np.ndarray, inputs: tuple[Tensor, ...]) -> Any:
    """What the model gives when every removed channel is multiplied by zero where a layer reads it.

    That is done to the weights: columns of readers of removed channels are zero.
    """
    model = copy.deepcopy(model)
    gone = known.gone(removed)
    with torch.no_grad():
        for (path, role), classes in known.slots.items():
            if role != "in":
                continue
            layer: Any = model.get_submodule(path)
            places = torch.from_numpy(np.flatnonzero(gone[classes]))
            if getattr(layer, "transposed", False):
                layer.weight[places] = 0
            elif getattr(layer, "groups", 1) > 1:
                run, rows = layer.in_channels // layer.groups, layer.out_channels // layer.groups
                for place in places.tolist():
                    group, column = divmod(place, run)
                    layer.weight[group * rows : (group + 1) * rows, column] = 0
            else:
                layer.weight[:, places] = 0
        return model(*inputs)


def shapes(outputs: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in torch.utils._pytree.tree_leaves(outputs)]


@pytest.mark.parametrize("name", GRAPHS)
@torch.no_grad()
def test_hard_graphs_are_cut_rightly_or_left_alone(name: str) -> None:
    torch.manual_seed(0)
    build, inputs, smaller = GRAPHS[name]
    model = settled(build())
    known = coupling(model, inputs if len(inputs) > 1 else inputs[0])
    makers = {path for path, role in known.slots if role == "out"}
    for path in makers:
        assert known.slots[path, "out"].any() or known.frozen.get(path), f"{path} stays without a reason"
    for seed in (0, 1, 2):
        rng = np.random.default_rng(seed)
        chosen = [rng.permutation(b.classes)[: len(b.classes) // 2] for b in known.bundles]
        removed = np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)
        kept = known.kept(removed)
        assert set(smaller.split()) <= {path for path, roles in kept.items() if roles.keys() & {"out", "channel"}}
        cut = recut(copy.deepcopy(model), known.plan(model, removed)).eval()
        found = cut(*inputs)
        assert shapes(found) == shapes(model(*inputs))
        expected = torch.utils._pytree.tree_leaves(zeroed(model, known, removed, inputs))
        for a, b in zip(torch.utils._pytree.tree_leaves(found), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
