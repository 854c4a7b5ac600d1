"""One operator at a time, and one channel at a time.

The oracle knows nothing of labels: where the filters that make a channel are zero, the uncut network gives what the
cut one does. Every channel that may go is tried alone, then half of all together.
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

from tersenet.graph.coupling import Coupling, coupling
from tersenet.graph.recut import recut


class Net(nn.Module):
    """Layers by name and a forward as a function, so that a case is one line."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(inputs: int, outputs: int, size: int = 3, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **kwargs)


def pool(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def after(function: Callable[[Tensor], Tensor], features: int = 6, channels: int = 6) -> Net:
    """A convolution, the operator, and a linear layer that reads the channels."""
    return Net(lambda m, x: m.fc(function(m.c1(x))), c1=conv(3, channels), fc=nn.Linear(features, 4))


def two(function: Callable[[Tensor, Tensor], Tensor], features: int = 6) -> Net:
    """The same with two convolutions."""
    return Net(lambda m, x: m.fc(function(m.c1(x), m.c2(x))), c1=conv(3, 6), c2=conv(3, 6), fc=nn.Linear(features, 4))


# name -> (network, does the operator let channels go)
CUT: dict[str, Callable[[], Net]] = {
    "mean_keepdim": lambda: after(lambda y: y.mean((2, 3), keepdim=True).flatten(1)),
    "reshape_as": lambda: after(lambda y: pool((y.flatten(2) * 2).reshape_as(y))),
    "to_device": lambda: after(lambda y: pool(y * torch.arange(12.0, device="cpu")[1].to(y.device, torch.float32))),
    "amax": lambda: after(lambda y: y.amax((2, 3))),
    "max_dim": lambda: after(lambda y: y.flatten(2).max(-1).values),
    "max_of_two": lambda: two(lambda a, b: pool(torch.max(a, b))),
    "minimum": lambda: two(lambda a, b: pool(torch.minimum(a, b))),
    "variance": lambda: after(lambda y: y.var((2, 3), unbiased=False)),
    "std_mean": lambda: after(lambda y: torch.std_mean(y, (2, 3))[1]),
    "length": lambda: after(lambda y: torch.linalg.vector_norm(y, dim=(2, 3))),
    "norm": lambda: after(lambda y: y.norm(dim=(2, 3))),
    "normalize_over_places": lambda: after(lambda y: F.normalize(y.flatten(2), dim=-1).amax(-1)),
    "logsumexp_minus": lambda: after(lambda y: pool(y * y.logsumexp((2, 3), keepdim=True))),
    "sum_over_channels": lambda: Net(
        lambda m, x: m.fc(m.c1(x).sum(1).flatten(1)), c1=conv(3, 6), fc=nn.Linear(64, 4)
    ),
    "softmax_over_places": lambda: after(lambda y: (y.flatten(2).softmax(-1) * y.flatten(2)).sum(-1)),
    "cumsum_over_places": lambda: after(lambda y: y.flatten(2).cumsum(-1).mean(-1)),
    "sort_places": lambda: after(lambda y: y.flatten(2).sort(-1).values[..., -5:].mean(-1)),
    "topk_places": lambda: after(lambda y: y.flatten(2).topk(3, dim=-1).values.sum(-1)),
    "roll_places": lambda: after(lambda y: y.roll((1, 2), (2, 3))[:, :, 0, 0]),
    "flip_places": lambda: after(lambda y: y.flip((2,))[:, :, 0].mean(-1)),
    "flip_channels": lambda: after(lambda y: pool(y.flip((1,)))),
    "stack": lambda: two(lambda a, b: pool(torch.stack([a, b], 2).sum(2))),
    "stack_behind": lambda: two(lambda a, b: pool(torch.stack([a, b], -1).amax(-1))),
    "concat_channels": lambda: two(lambda a, b: pool(torch.cat([a, b], 1)), 12),
    "concat_places": lambda: two(lambda a, b: pool(torch.cat([a, b], 2))),
    "where": lambda: two(lambda a, b: pool(torch.where(a > b, a, b * 0.5))),
    "masked_fill": lambda: after(lambda y: pool(y.masked_fill(y < 0, 0.0))),
    "clamp_pow": lambda: after(lambda y: pool(y.clamp(-1, 1).pow(2))),
    "addcmul": lambda: two(lambda a, b: pool(torch.addcmul(a, a, b, value=0.5))),
    "lerp": lambda: two(lambda a, b: pool(torch.lerp(a, b, 0.3))),
    "hardswish": lambda: after(lambda y: pool(F.hardswish(y))),
    "movedim": lambda: Net(
        lambda m, x: m.fc(m.l1(m.c1(x).movedim(1, -1)).movedim((-1, 1), (1, 2)).mean((2, 3))),
        c1=conv(3, 6), l1=nn.Linear(6, 6), fc=nn.Linear(6, 4),
    ),
    "mT": lambda: after(lambda y: y.flatten(2).mT.mean(1)),
    "resize": lambda: after(lambda y: pool(F.interpolate(y, size=(5, 5), mode="bilinear", antialias=True))),
    "unfold": lambda: Net(
        lambda m, x: m.fc(F.unfold(m.c1(x), 3, padding=1).mean(-1)), c1=conv(3, 6), fc=nn.Linear(54, 4)
    ),
    "fold": lambda: after(lambda y: pool(F.fold(F.unfold(y, 2, stride=2), (8, 8), 2, stride=2))),
    "windows": lambda: after(lambda y: y.unfold(3, 2, 2).amax(-1).mean((2, 3))),
    "reflection_pad": lambda: after(lambda y: pool(F.pad(y, (1, 1, 1, 1), mode="reflect"))),
    "max_pool_with_places": lambda: after(lambda y: pool(F.max_pool2d(y, 2, return_indices=True)[0])),
    "narrow_places": lambda: after(lambda y: pool(y.narrow(3, 2, 3))),
    "tile_places": lambda: after(lambda y: pool(y.tile((2,)))),
    "tile_channels": lambda: after(lambda y: y.mean((2, 3)).tile((2,)), 12),
    "repeat_channels": lambda: after(lambda y: pool(y.repeat(1, 2, 1, 1)), 12),
    "repeat_interleave": lambda: after(lambda y: pool(y.repeat_interleave(2, 1)), 12),
    "unbind_places": lambda: after(lambda y: (p := y.mean(3).unbind(2))[0] + p[3]),
    "einsum": lambda: two(lambda a, b: torch.einsum("nchw,nchw->nc", a, b)),
    "einsum_products": lambda: Net(
        lambda m, x: m.fc(torch.einsum("nct,ndt->nd", m.c1(x).flatten(2), m.c2(x).flatten(2))),
        c1=conv(3, 6), c2=conv(3, 6), fc=nn.Linear(6, 4),
    ),
    "bmm": lambda: two(lambda a, b: torch.bmm(a.flatten(2), b.flatten(2).transpose(1, 2)).sum(1)),
    "index_places": lambda: after(lambda y: y.flatten(2)[:, :, torch.tensor([3, 1])].sum(-1)),
    "slice_channels": lambda: after(lambda y: pool(y[:, 2:])[:, :], 4),
    "squeeze": lambda: after(lambda y: y.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1)),
    "glu": lambda: after(lambda y: pool(F.glu(y, 1)), 3),
    "zeros_beside": lambda: after(lambda y: pool(torch.cat([y, y.new_zeros(y.shape)], 1)), 12),
}  # fmt: skip

# What is normalised over channels sees those that are left, so zeros are no oracle there; these only have to run.
NORMS: dict[str, Callable[[], Net]] = {
    "mean_over_channels": lambda: after(lambda y: pool(y - y.mean(1, keepdim=True))),
    "rms_over_channels": lambda: after(lambda y: pool(y * torch.rsqrt(y.pow(2).mean(1, keepdim=True) + 1e-6))),
    "var_mean_over_channels": lambda: after(
        lambda y: pool((y - (s := torch.var_mean(y, 1, keepdim=True))[1]) / (s[0] + 1).sqrt())
    ),
    "length_over_channels": lambda: after(lambda y: pool(F.normalize(y, dim=1))),
    "max_over_channels": lambda: after(lambda y: pool(y * y.amax(1, keepdim=True).sigmoid())),
    "greatest_over_channels": lambda: after(lambda y: pool(y * y.max(1, keepdim=True).values)),
    "response": lambda: after(
        lambda y: pool(y * (g := y.norm(p=2, dim=(2, 3), keepdim=True)) / (g.mean(1, keepdim=True) + 1e-6))
    ),
}

# name -> (network, what its reason must say)
STAYS: dict[str, tuple[Callable[[], Net], str]] = {
    "place_of_greatest": (lambda: Net(
        lambda m, x: m.fc(m.c1(x).max(1).indices.flatten(1).float()), c1=conv(3, 6), fc=nn.Linear(64, 4)),
        "works across"),
    "argmax_over_channels": (lambda: Net(
        lambda m, x: m.fc(m.c1(x).argmax(1).flatten(1).float()), c1=conv(3, 6), fc=nn.Linear(64, 4)), "works across"),
    "longest_over_channels": (lambda: Net(
        lambda m, x: m.fc(torch.linalg.vector_norm(m.c1(x), float("inf"), 1).flatten(1)), c1=conv(3, 6),
        fc=nn.Linear(64, 4)), "works across"),
    "softmax_over_channels": (lambda: after(lambda y: pool(y.softmax(1))), "works across"),
    "cumsum_over_channels": (lambda: after(lambda y: pool(y.cumsum(1))), "works across"),
    "sort_channels": (lambda: after(lambda y: pool(y).sort(1).values), "works across"),
    "topk_channels": (lambda: after(lambda y: pool(y).topk(3, 1).values, 3), "by their values"),
    "roll_channels": (lambda: after(lambda y: pool(y.roll(1, 1))), "rolls"),
    "roll_everything": (lambda: after(lambda y: pool(y.roll(7))), "rolls"),
    "narrow_channels": (lambda: after(lambda y: pool(y.narrow(1, 2, 3)), 3), "by their number"),
    "select_channel": (lambda: after(lambda y: y[:, 2].flatten(1), 64), "by its number"),
    "every_second_channel": (lambda: after(lambda y: pool(y[:, ::2]), 3), "by their number"),
    "pool_over_channels": (lambda: after(lambda y: F.avg_pool1d(pool(y)[:, None], 2)[:, 0], 3), "works along"),
    "triangle": (lambda: after(lambda y: y.flatten(2).mT.tril().sum(1)), "works across"),
    "windows_over_channels": (lambda: after(lambda y: pool(y).unfold(1, 2, 2).sum(-1), 3), "works along"),
    "index_channels": (lambda: after(lambda y: pool(y[:, torch.tensor([0, 2, 1])]), 3), ""),
    "gather": (lambda: after(lambda y: pool(y).gather(1, torch.zeros(2, 3, dtype=torch.long)), 3), "not known"),
    "fixed_numbers": (lambda: after(lambda y: pool(y) * torch.linspace(0, 1, 6)), ""),
}  # fmt: skip


def small(model: nn.Module, known: Coupling, removed: np.ndarray) -> nn.Module:
    """The cut network; the model stays as it is."""
    return recut(copy.deepcopy(model), known.plan(model, removed)).eval()


def zeroed(model: nn.Module, kept: dict[str, dict[str, list[int]]]) -> nn.Module:
    """A copy in which the filters that make removed channels are zero."""
    model = copy.deepcopy(model)
    for path, roles in kept.items():
        layer: Any = model.get_submodule(path.rpartition(".")[0] if path.endswith(("weight", "bias")) else path)
        rows = roles.get("out") or (roles.get("dim0") if path.endswith("weight") else None)
        if rows:
            gone = [i for i in range(len(layer.weight)) if i not in rows]
            with torch.no_grad():
                layer.weight[gone] = 0
                layer.bias[gone] = 0
    return model


def tries(known: Coupling) -> list[np.ndarray]:
    """Every class alone, and half of all."""
    alone = [bundle.classes[[i]] for bundle in known.bundles for i in range(len(bundle.classes))]
    half = [bundle.classes[::2][: len(bundle.classes) - 1] for bundle in known.bundles]
    return [*alone, np.concatenate(half)]


def seen(build: Callable[[], Net]) -> tuple[Net, Tensor, Coupling]:
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(2, 3, 8, 8)
    return model, x, coupling(model, x)


@pytest.mark.parametrize("name", CUT)
@torch.no_grad()
def test_the_cut_network_is_the_one_with_zeros(name: str) -> None:
    model, x, known = seen(CUT[name])
    assert "c1" in {path for bundle in known.bundles for path, _ in bundle.members}, known.frozen
    for removed in tries(known):
        cut = small(model, known, removed)
        assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())
        torch.testing.assert_close(cut(x), zeroed(model, known.kept(removed))(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_statistics_over_channels_are_of_those_that_are_left(name: str) -> None:
    model, x, known = seen(NORMS[name])
    assert len(known.bundles) == 1, known.frozen
    for removed in tries(known):
        kept = known.kept(removed)
        alone = copy.deepcopy(model)  # the same function on fewer channels, written by hand
        alone.c1.weight = nn.Parameter(model.c1.weight[kept["c1"]["out"]])
        alone.c1.bias = nn.Parameter(model.c1.bias[kept["c1"]["out"]])
        alone.fc.weight = nn.Parameter(model.fc.weight[:, kept["c1"]["out"]])
        torch.testing.assert_close(small(model, known, removed)(x), alone(x))


def by_mean(weight: Tensor) -> Tensor:
    weight = weight - weight.mean((1, 2, 3), keepdim=True)
    return weight / weight.std((1, 2, 3), keepdim=True)


def by_batch_norm(weight: Tensor) -> Tensor:
    """Every kernel laid flat, as one channel of a batch norm: how it is written for speed."""
    flat = weight.reshape(1, weight.shape[0], -1)
    return F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(weight)


@pytest.mark.parametrize("way", [by_mean, by_batch_norm])
@torch.no_grad()
def test_standardised_weights_are_standardised_by_what_is_left(way: Callable[[Tensor], Tensor]) -> None:
    def standardised(m: Net, x: Tensor) -> Tensor:
        return m.fc(pool(F.conv2d(m.c1(x), way(m.c2.weight), m.c2.bias, padding=1)))

    model, x, known = seen(lambda: Net(standardised, c1=conv(3, 6), c2=conv(6, 8), fc=nn.Linear(8, 4)))
    assert len(known.bundles) == 2, known.frozen
    for removed in tries(known):
        alone, kept = copy.deepcopy(model), known.kept(removed)
        one = kept.get("c1", {}).get("out", range(6))
        two_ = kept.get("c2.weight", {}).get("dim0", range(8))
        alone.c1.weight, alone.c1.bias = (nn.Parameter(p[list(one)]) for p in (model.c1.weight, model.c1.bias))
        alone.c2.weight = nn.Parameter(model.c2.weight[list(two_)][:, list(one)])
        alone.c2.bias = nn.Parameter(model.c2.bias[list(two_)])
        alone.fc.weight = nn.Parameter(model.fc.weight[:, list(two_)])
        torch.testing.assert_close(small(model, known, removed)(x), alone(x))


@pytest.mark.parametrize("name", STAYS)
def test_what_depends_on_the_others_stays_and_says_why(name: str) -> None:
    build, said = STAYS[name]
    _, _, known = seen(build)
    assert said in known.frozen["c1"]
    assert not known.bundles
