"""The oracle is independent of the labels: a network whose removed filters are zero computes what the cut one does."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tersenet.bricks.shortcut import PadShortcut
from tersenet.graph.capture import export
from tersenet.graph.coupling import coupling
from tersenet.graph.recut import recut
from tersenet.graph.surgery import cut


class Net(nn.Module):
    """Layers by name and a forward as a function, so that a case is one line."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(inputs: int, outputs: int, size: int = 3, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **kwargs)


def shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def pool(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def shuffle_unit(m: Net, x: Tensor) -> Tensor:
    """ShuffleNetV2's unit: split, one half through a branch, concat, shuffle."""
    a, b = torch.relu(m.stem(x)).chunk(2, dim=1)
    b = torch.relu(m.b3(m.c3(m.b2(m.c2(torch.relu(m.b1(m.c1(b))))))))
    return m.fc(pool(torch.relu(m.last(shuffle(torch.cat([a, b], 1), 2)))))


def dense_block(m: Net, x: Tensor) -> Tensor:
    """DenseNet: every layer reads all before it."""
    x = m.stem(x)
    x = torch.cat([x, m.c1(torch.relu(m.b1(x)))], 1)
    x = torch.cat([x, m.c2(torch.relu(m.b2(x)))], 1)
    return m.fc(pool(torch.relu(m.b3(x))))


def squeeze_excite(m: Net, x: Tensor) -> Tensor:
    x = torch.relu(m.bn(m.c1(x)))
    return m.fc(pool(x * torch.sigmoid(m.up(torch.relu(m.down(x.mean((2, 3), keepdim=True)))))))


class Tied(Net):
    def __init__(self) -> None:
        super().__init__(None)
        self.c1, self.c2, self.c3, self.fc = conv(3, 8), conv(8, 8), conv(8, 8), nn.Linear(8, 4)
        self.c3.weight = self.c2.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(pool(self.c3(torch.relu(self.c2(torch.relu(self.c1(x)))))))


CASES = {
    "tied": Tied,
    "view_with_sizes": lambda: Net(lambda m, x: m.fc(m.c1(x).view(-1, 512)), c1=conv(3, 8), fc=nn.Linear(512, 4)),
    "split_with_sizes": lambda: Net(
        lambda m, x: m.fc(pool(torch.cat(torch.split(m.c1(x), [3, 5], 1), 1))), c1=conv(3, 8), fc=nn.Linear(8, 4)
    ),
    "split_with_a_size": lambda: Net(
        lambda m, x: m.fc(pool(torch.mul(*m.c1(x).split(4, 1)))), c1=conv(3, 8), fc=nn.Linear(4, 4)
    ),
    "unequal_chunks": lambda: Net(
        lambda m, x: m.fc(pool(torch.cat(m.c1(x).chunk(3, 1)[::-1], 1))), c1=conv(3, 8), fc=nn.Linear(8, 4)
    ),
    "slice": lambda: Net(
        lambda m, x: m.fc(pool((y := m.c1(x))[:, :3])) + m.fd(pool(y[:, -6:-1])),
        c1=conv(3, 8), fc=nn.Linear(3, 4), fd=nn.Linear(5, 4),
    ),
    "shuffle_with_sizes": lambda: Net(
        lambda m, x: m.fc(pool(m.c1(x).view(-1, 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8))),
        c1=conv(3, 8), fc=nn.Linear(8, 4),
    ),
    "batch_in_a_size": lambda: Net(
        lambda m, x: m.fc(m.l1(m.c1(x).flatten(2).reshape(x.shape[0] * 8, 64)).reshape(x.shape[0], 8, 5).sum(2)),
        c1=conv(3, 8), l1=nn.Linear(64, 5, bias=False), fc=nn.Linear(8, 4),
    ),
    "new_tensors": lambda: Net(
        lambda m, x: m.fc(
            pool(torch.cat([y := m.c1(x), y.new_zeros(x.shape[0], 8, 8, 8)], 2) * torch.full((8, 1, 1), 2.0))
        ),
        c1=conv(3, 8), fc=nn.Linear(8, 4),
    ),
    "expand_with_sizes": lambda: Net(
        lambda m, x: m.fc(pool(m.c1(x).mean((2, 3), keepdim=True).expand(-1, 8, 4, 4))),
        c1=conv(3, 8), fc=nn.Linear(8, 4),
    ),
    "dead_code": lambda: Net(
        lambda m, x: (y := m.c1(x), y.view(y.shape[0], 8, 64), m.fc(pool(y)))[2], c1=conv(3, 8), fc=nn.Linear(8, 4)
    ),
    "branch_on_a_size": lambda: Net(
        lambda m, x: m.fc(pool(m.c2(y) if (y := m.c1(x)).shape[1] > 6 else y)),
        c1=conv(3, 8), c2=conv(8, 8), fc=nn.Linear(8, 4),
    ),
    "chain": lambda: Net(
        lambda m, x: m.fc(pool(torch.relu(m.c2(torch.relu(m.bn(m.c1(x))))))),
        c1=conv(3, 8), bn=nn.BatchNorm2d(8), c2=conv(8, 6), fc=nn.Linear(6, 4),
    ),
    "residual": lambda: Net(
        lambda m, x: m.fc(pool((y := torch.relu(m.c1(x))) + m.c3(torch.relu(m.c2(y))))),
        c1=conv(3, 8), c2=conv(8, 6), c3=conv(6, 8), fc=nn.Linear(8, 4),
    ),
    "projection": lambda: Net(
        lambda m, x: m.fc(pool(torch.relu(m.b(m.c2(torch.relu(m.c1(x)))) + m.short(x)))),
        c1=conv(3, 8), c2=conv(8, 6), b=nn.BatchNorm2d(6), short=conv(3, 6, 1), fc=nn.Linear(6, 4),
    ),
    "pad_shortcut": lambda: Net(
        lambda m, x: m.fc(pool(torch.relu(m.c2(torch.relu(y := m.c1(x))) + m.short(y)))),
        c1=conv(3, 8), c2=conv(8, 16, stride=2), short=PadShortcut(2, 4, 4), fc=nn.Linear(16, 4),
    ),
    "pad_in_forward": lambda: Net(
        lambda m, x: m.fc(pool(m.c2(torch.relu(y := m.c1(x))) + F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))),
        c1=conv(3, 8), c2=conv(8, 16, stride=2), fc=nn.Linear(16, 4),
    ),
    "dense": lambda: Net(
        dense_block, stem=conv(3, 6), b1=nn.BatchNorm2d(6), c1=conv(6, 4), b2=nn.BatchNorm2d(10), c2=conv(10, 4),
        b3=nn.BatchNorm2d(14), fc=nn.Linear(14, 4),
    ),
    "shuffle_unit": lambda: Net(
        shuffle_unit, stem=conv(3, 8), c1=conv(4, 4, 1), b1=nn.BatchNorm2d(4), c2=conv(4, 4, groups=4, bias=False),
        b2=nn.BatchNorm2d(4), c3=conv(4, 4, 1), b3=nn.BatchNorm2d(4), last=conv(8, 6, 1), fc=nn.Linear(6, 4),
    ),
    "shuffle_open_size": lambda: Net(
        lambda m, x: m.fc(
            pool(m.c2(m.c1(x).reshape(x.shape[0], 2, -1, 64).permute(0, 2, 1, 3).reshape(x.shape[0], -1, 8, 8)))
        ),
        c1=conv(3, 8), c2=conv(8, 6), fc=nn.Linear(6, 4),
    ),
    "shuffle_layer": lambda: Net(
        lambda m, x: m.fc(pool(m.c2(m.s(m.c1(x))))),
        c1=conv(3, 12), s=nn.ChannelShuffle(3), c2=conv(12, 6, groups=2), fc=nn.Linear(6, 4),
    ),
    "split": lambda: Net(
        lambda m, x: m.fc(pool(torch.mul(*torch.split(y := m.c1(x), y.shape[1] // 2, dim=1)))),
        c1=conv(3, 8), fc=nn.Linear(4, 4),
    ),
    "grouped": lambda: Net(
        lambda m, x: m.fc(pool(m.c3(torch.relu(m.c2(torch.relu(m.c1(x))))))),
        c1=conv(3, 8), c2=conv(8, 12, groups=2), c3=conv(12, 6, groups=3), fc=nn.Linear(6, 4),
    ),
    "depthwise": lambda: Net(
        lambda m, x: m.fc(pool(m.c2(torch.relu(m.bn(m.dw(F.relu6(m.c1(x)))))))),
        c1=conv(3, 8), dw=conv(8, 8, groups=8, bias=False), bn=nn.BatchNorm2d(8), c2=conv(8, 6, 1), fc=nn.Linear(6, 4),
    ),
    "depthwise_multiplier": lambda: Net(
        lambda m, x: m.fc(pool(m.c2(torch.relu(m.dw(m.c1(x)))))),
        c1=conv(3, 4), dw=conv(4, 12, groups=4), c2=conv(12, 6), fc=nn.Linear(6, 4),
    ),
    "one_channel": lambda: Net(
        lambda m, x: m.fc(pool(torch.relu(m.c3(m.c2(m.c1(x)))))),
        c1=conv(3, 1), c2=conv(1, 1), c3=conv(1, 8), fc=nn.Linear(8, 4),
    ),
    "attention_map": lambda: Net(
        lambda m, x: m.fc(pool((y := torch.relu(m.c1(x))) * torch.sigmoid(m.gate(y)))),
        c1=conv(3, 8), gate=conv(8, 1), fc=nn.Linear(8, 4),
    ),
    "flatten": lambda: Net(
        lambda m, x: m.fc(torch.flatten(F.max_pool2d(torch.relu(m.c1(x)), 2), 1)), c1=conv(3, 6), fc=nn.Linear(96, 4)
    ),
    "flatten_layer": lambda: Net(
        lambda m, x: m.fc(m.flat(m.pool(torch.relu(m.c1(x))))),
        c1=conv(3, 6), pool=nn.MaxPool2d(2), flat=nn.Flatten(), fc=nn.Linear(96, 4),
    ),
    "view_open_size": lambda: Net(lambda m, x: m.fc(m.c1(x).view(x.shape[0], -1)), c1=conv(3, 6), fc=nn.Linear(384, 4)),
    "prelu": lambda: Net(
        lambda m, x: m.fc(pool(m.one(m.c2(m.act(m.c1(x)))))),
        c1=conv(3, 8), act=nn.PReLU(8), c2=conv(8, 6), one=nn.PReLU(), fc=nn.Linear(6, 4),
    ),
    "squeeze_excite": lambda: Net(
        squeeze_excite, c1=conv(3, 8), bn=nn.BatchNorm2d(8), down=conv(8, 4, 1), up=conv(4, 8, 1), fc=nn.Linear(8, 4)
    ),
    "transposed": lambda: Net(
        lambda m, x: m.fc(pool(m.dw(m.t2(torch.relu(m.t1(m.c1(x))))))),
        c1=conv(3, 8), t1=nn.ConvTranspose2d(8, 6, 2, 2), t2=nn.ConvTranspose2d(6, 8, 2, 2, groups=2),
        dw=nn.ConvTranspose2d(8, 8, 2, groups=8), fc=nn.Linear(8, 4),
    ),
    "instance_norm": lambda: Net(
        lambda m, x: m.fc(F.adaptive_max_pool2d(m.n2(m.c2(torch.relu(m.n1(m.c1(x))))), 1).flatten(1)),
        c1=conv(3, 8), n1=nn.InstanceNorm2d(8, affine=True), c2=conv(8, 6), n2=nn.GroupNorm(6, 6), fc=nn.Linear(6, 4),
    ),
    "resize": lambda: Net(
        lambda m, x: m.fc(pool(m.c2(m.up(F.interpolate(m.drop(F.hardswish(m.c1(x))), scale_factor=2))))),
        c1=conv(3, 8), drop=nn.Dropout2d(), up=nn.Upsample(scale_factor=2), c2=conv(8, 6), fc=nn.Linear(6, 4),
    ),
    "pixel_shuffle": lambda: Net(
        lambda m, x: m.fc(pool(m.c2(m.up(m.c1(x))))),
        c1=conv(3, 24), up=nn.PixelShuffle(2), c2=conv(6, 6), fc=nn.Linear(6, 4),
    ),
    "channels_last": lambda: Net(
        lambda m, x: m.fc(m.l2(F.gelu(m.l1(m.c1(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2).mean((2, 3))),
        c1=conv(3, 8), l1=nn.Linear(8, 12), l2=nn.Linear(12, 6), fc=nn.Linear(6, 4),
    ),
    "softmax_over_places": lambda: Net(
        lambda m, x: m.fc((m.c1(x).flatten(2).softmax(-1) * m.c2(x).flatten(2)).sum(-1)),
        c1=conv(3, 8), c2=conv(3, 8), fc=nn.Linear(8, 4),
    ),
    "conv1d": lambda: Net(
        lambda m, x: m.fc(m.c2(m.bn(m.c1(x.flatten(2)))).mean(2)),
        c1=nn.Conv1d(3, 8, 3), bn=nn.BatchNorm1d(8), c2=nn.Conv1d(8, 6, 3), fc=nn.Linear(6, 4),
    ),
    "called_twice": lambda: Net(
        lambda m, x: m.fc(pool(m.c2(torch.relu(m.c2(torch.relu(m.c1(x))))))),
        c1=conv(3, 8), c2=conv(8, 8), fc=nn.Linear(8, 4),
    ),
    "in_place": lambda: Net(
        lambda m, x: m.fc(pool(F.relu_(m.c1(x)).add_(m.c2(x)))), c1=conv(3, 8), c2=conv(3, 8), fc=nn.Linear(8, 4)
    ),
}  # fmt: skip
TRACED = {
    "view_with_sizes", "split_with_sizes", "split_with_a_size", "unequal_chunks", "slice", "shuffle_with_sizes",
    "batch_in_a_size", "new_tensors", "expand_with_sizes", "dead_code", "branch_on_a_size", "pad_in_forward",
}  # fmt: skip


def settled(model: nn.Module) -> nn.Module:
    """Random numbers everywhere, also in norms; evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.PReLU):
            nn.init.normal_(module.weight)
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm):
            nn.init.normal_(module.bias)
    return model.eval()


def zeroed(model: nn.Module, kept: dict) -> nn.Module:
    """A copy in which what makes a removed channel gives zero: filters and biases, norms' scales and shifts."""
    model = copy.deepcopy(model)
    for path, roles in kept.items():
        module = model.get_submodule(path)
        role = "out" if "out" in roles else "channel" if "channel" in roles else None
        if role is None or isinstance(module, nn.PReLU):  # PReLU keeps zeros as they are
            continue
        grouped = getattr(module, "groups", 1)
        repeat = (
            module.out_channels // module.in_channels if role == "channel" and hasattr(module, "in_channels") else 1
        )
        size = len(module.weight) if module.bias is None else len(module.bias)
        gone = [i for i in range(size) if i // repeat not in roles[role]]
        with torch.no_grad():
            if getattr(module, "transposed", False) and role == "out":
                for i in gone:  # weight (I, O / groups, ...): output i is made by its group's inputs only
                    group, place = divmod(i, module.out_channels // grouped)
                    share = module.in_channels // grouped
                    module.weight[group * share : (group + 1) * share, place] = 0
            else:
                module.weight[gone] = 0
            if module.bias is not None:
                module.bias[gone] = 0
    return model


def removable(known, seed: int, share: float = 0.5) -> np.ndarray:
    """A random choice of classes of every bundle, never all of one."""
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [rng.permutation(b.classes)[: int(len(b.classes) * share)] for b in known.bundles] or [np.zeros(0, int)]
    )


@pytest.mark.parametrize("name", CASES)
def test_the_cut_network_is_the_one_with_zeros(name: str) -> None:
    torch.manual_seed(0)
    model = settled(CASES[name]())
    x = torch.randn(2, 3, 8, 8)
    known = coupling(model, x)
    assert known.frozen.pop("fc"), "the head keeps its outputs"
    known.frozen.pop("fd", None)
    assert not known.frozen
    assert known.bundles
    for seed in (0, 1):
        kept = known.kept(removable(known, seed))
        small = recut(copy.deepcopy(model), known.plan(model, removable(known, seed)))
        assert isinstance(small, Net) != (name in TRACED), "the graph takes the model's place where it must"
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        with torch.no_grad():
            torch.testing.assert_close(small(x), zeroed(model, kept)(x), rtol=1e-4, atol=1e-5)
    exported = export(small, x).module()
    torch.testing.assert_close(exported(x), small(x), rtol=1e-4, atol=1e-5)


def test_members_of_a_residual_net() -> None:
    known = coupling(CASES["residual"]().eval(), torch.randn(2, 3, 8, 8))
    inner, outer = sorted(known.bundles, key=lambda bundle: bundle.residual)
    assert set(inner.members) == {("c2", "out"), ("c3", "in")}
    assert set(outer.members) == {("c1", "out"), ("c2", "in"), ("c3", "out"), ("fc", "in")}
    assert (len(inner.classes), len(outer.classes)) == (6, 8)


@pytest.mark.parametrize("name", ["shuffle_unit", "shuffle_open_size"])
def test_a_shuffle_keeps_its_groups_and_cuts_within_them(name: str) -> None:
    """8 channels in 2 groups: 4 places can go, not 2 groups."""
    known = coupling(CASES[name]().eval(), torch.randn(2, 3, 8, 8))
    shuffled = next(b for b in known.bundles if (("last" if name == "shuffle_unit" else "c2"), "in") in b.members)
    assert len(shuffled.classes) == 4


def test_norms_over_channels_are_those_of_what_is_left() -> None:
    """Layer and group norms see fewer channels, so zeros are no oracle: the norm is written out on the kept ones."""
    torch.manual_seed(0)
    model = settled(
        Net(
            lambda m, x: m.fc(m.ln(pool(m.gn(m.c1(x))))),
            c1=conv(3, 8), gn=nn.GroupNorm(2, 8), ln=nn.LayerNorm(8), fc=nn.Linear(8, 4),
        )
    )  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    known = coupling(model, x)
    assert [len(bundle.classes) for bundle in known.bundles] == [4], "the two groups lose the same places"
    kept = known.kept(known.bundles[0].classes[[1, 2]])
    assert kept["gn"] == {"channel": [0, 3, 4, 7]}
    small = cut(copy.deepcopy(model), kept, x)
    index = kept["gn"]["channel"]
    y = F.group_norm(model.c1(x)[:, index], 2, model.gn.weight[index], model.gn.bias[index])
    y = F.layer_norm(pool(y), (4,), model.ln.weight[index], model.ln.bias[index])
    torch.testing.assert_close(small(x), F.linear(y, model.fc.weight[:, index], model.fc.bias))


FROZEN = {
    "select": (
        lambda: Net(lambda m, x: m.fc(m.c1(x)[:, 0].flatten(1)), c1=conv(3, 8), fc=nn.Linear(64, 4)), "aten.select"
    ),
    "softmax": (
        lambda: Net(lambda m, x: m.fc(pool(m.c1(x).softmax(1))), c1=conv(3, 8), fc=nn.Linear(8, 4)), "aten.softmax"
    ),
    "unknown": (
        lambda: Net(lambda m, x: m.fc(torch.cdist(y := pool(m.c1(x)), y) @ y), c1=conv(3, 8), fc=nn.Linear(8, 4)),
        "aten.cdist",
    ),
    "fixed_tensor": (
        lambda: Net(lambda m, x: m.fc(pool(m.c1(x)) * torch.arange(8.0)), c1=conv(3, 8), fc=nn.Linear(8, 4)), "aten.mul"
    ),
    "output": (lambda: Net(lambda m, x: m.c1(x), c1=conv(3, 8)), "output"),
    "parametrized": (
        lambda: Net(
            lambda m, x: m.fc(pool(m.c2(m.c1(x)))),
            c1=conv(3, 8), c2=parametrizations.weight_norm(conv(8, 8)), fc=nn.Linear(8, 4),
        ),
        "c2",
    ),
    "weight_used_elsewhere": (
        lambda: Net(lambda m, x: m.fc(pool(m.c1(x))) * m.c1.weight.sum(), c1=conv(3, 8), fc=nn.Linear(8, 4)), "outside"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_what_cannot_be_cut_is_frozen_with_its_reason(name: str) -> None:
    build, said = FROZEN[name]
    model = build().eval()
    known = coupling(model, torch.randn(2, 3, 8, 8))
    assert said in known.frozen["c1"]
    assert not known.bundles
    if said.startswith("aten."):
        assert "self.function(self, x)" in known.frozen["c1"] or "lambda" in known.frozen["c1"], "where it stands"


def test_a_weight_shared_by_unlike_layers_is_frozen_and_the_rest_is_not() -> None:
    model = Tied()
    model.c3 = nn.ConvTranspose2d(8, 8, 3, padding=1, groups=2)
    model.c2 = conv(8, 4)
    model.c2.weight = model.c3.weight = nn.Parameter(torch.randn(8, 4, 3, 3))
    model.c2.in_channels, model.c2.out_channels, model.c2.bias = 4, 8, None
    model.c1 = conv(3, 4)
    known = coupling(model.eval(), torch.randn(2, 3, 8, 8))
    assert "shares its weight with c2" in known.frozen["c3"]
    assert {"c1", "c2"} <= set(known.frozen), "c2 cannot lose inputs either"


def test_a_shared_weight_stays_shared() -> None:
    model = Tied().eval()
    known = coupling(model, torch.randn(2, 3, 8, 8))
    small = recut(copy.deepcopy(model), known.plan(model, removable(known, 0)))
    assert small.c2.weight is small.c3.weight
    assert len(small.c2.weight) == 4


def test_a_culprit_does_not_freeze_its_neighbours() -> None:
    model = Net(
        lambda m, x: m.fc(pool(m.c3(torch.relu(m.c2(torch.relu(m.c1(x)))))[:, 0:8:2])),
        c1=conv(3, 8), c2=conv(8, 6), c3=conv(6, 8), fc=nn.Linear(4, 4),
    )  # fmt: skip
    known = coupling(model.eval(), torch.randn(2, 3, 8, 8))
    assert set(known.frozen) == {"c3", "fc"}
    assert [bundle.members[0] for bundle in known.bundles] == [("c1", "out"), ("c2", "out")]


def test_the_model_is_untouched() -> None:
    model = CASES["shuffle_unit"]()
    model.train()
    before = copy.deepcopy(model.state_dict())
    coupling(model, torch.randn(2, 3, 8, 8))
    assert model.training
    assert model.c2.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
