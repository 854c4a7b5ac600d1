"""Attention, bare parameters, masks and plans. The oracle: zeros in the weights that make the removed channels."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from tersenet.bricks.mask import Mask
from tersenet.errors import SurgeryError
from tersenet.graph.capture import export
from tersenet.graph.coupling import Coupling, coupling
from tersenet.graph.recut import recut

HEADS, SIZE, WIDTH, TOKENS = 4, 3, 12, 5


class Attention(nn.Module):
    """Self-attention over (N, T, C) in one of the ways in which people write it, and a head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        groups = 2 if kind == "grouped" else HEADS
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * SIZE)
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * SIZE) for n in (HEADS, groups, groups))
        self.proj, self.fc = nn.Linear(HEADS * SIZE, WIDTH), nn.Linear(WIDTH, 2)
        self.table = nn.Parameter(torch.randn(9, HEADS))
        self.logit_scale = nn.Parameter(torch.rand(HEADS, 1, 1))
        place = torch.arange(TOKENS)
        self.register_buffer("index", (place[:, None] - place + TOKENS - 1).view(-1), persistent=False)
        self.multi = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(getattr(self, self.kind)(x).sum(1))

    def packed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, t, _ = x.shape
        return self.qkv(x).reshape(n, t, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[return-value]

    def merge(self, x: Tensor) -> Tensor:
        return self.proj(x.transpose(1, 2).reshape(x.shape[0], -1, HEADS * SIZE))

    def by_hand(self, x: Tensor) -> Tensor:
        q, k, v = self.packed(x)
        return self.merge((q * SIZE**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v)

    def fused(self, x: Tensor) -> Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.packed(x)))

    def einsum(self, x: Tensor) -> Tensor:
        q, k, v = self.packed(x)
        return self.merge(torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v))

    def biased(self, x: Tensor) -> Tensor:
        q, k, v = self.packed(x)
        bias = self.table[self.index].view(TOKENS, TOKENS, -1).permute(2, 0, 1).contiguous()
        scores = q @ k.transpose(-2, -1) * self.logit_scale + bias.unsqueeze(0)
        return self.merge(scores.softmax(-1) @ v)

    def fixed_bias(self, x: Tensor) -> Tensor:
        """Four numbers that are no parameter: no head can go, but parts of all of them can."""
        q, k, v = self.packed(x)
        slope = torch.arange(1, 5).view(HEADS, 1, 1)
        return self.merge(F.scaled_dot_product_attention(q, k, v, x.new_ones(TOKENS, TOKENS) * slope))

    def separate(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, HEADS, SIZE).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.merge(F.scaled_dot_product_attention(q, k, v))

    def grouped(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, HEADS, SIZE).transpose(1, 2)
        k, v = (
            layer(x).view(n, t, 2, SIZE).transpose(1, 2)[:, :, None].expand(n, 2, 2, t, SIZE).reshape(n, 4, t, SIZE)
            for layer in (self.k, self.v)
        )
        return self.merge(F.scaled_dot_product_attention(q, k, v))

    def torchs_own(self, x: Tensor) -> Tensor:
        return self.multi(x, x, x, need_weights=False)[0]


def zeroed(model: nn.Module, kept: dict) -> nn.Module:
    """A copy with zeros in what makes a removed channel: rows and biases of layers, slices of bare parameters."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for path, roles in kept.items():
            owner, _, name = path.rpartition(".")
            for role, indices in roles.items():
                if role.startswith("dim"):
                    tensor, dim = getattr(model.get_submodule(owner), name), int(role[3:])
                    gone = [i for i in range(tensor.shape[dim]) if i not in indices]
                    tensor.index_fill_(dim, torch.tensor(gone), 0)
                elif role == "out":
                    layer: Any = model.get_submodule(path)
                    gone = [i for i in range(len(layer.weight)) if i not in indices]
                    for tensor in (layer.weight, layer.bias):
                        if tensor is not None:
                            tensor[gone] = 0
    return model


def half(known: Coupling, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(b.classes)[: len(b.classes) // 2] for b in known.bundles])


def replayed(model: nn.Module, known: Coupling, removed: np.ndarray) -> nn.Module:
    """The cut, after its plan was JSON, on a fresh model with the same numbers."""
    return recut(copy.deepcopy(model), json.loads(json.dumps(known.plan(model, removed)))).eval()


# What is cut of each kind: how many places, in how many rows of the layer that makes them.
KINDS = {
    "by_hand": (HEADS, "qkv"), "fused": (HEADS, "qkv"), "einsum": (HEADS, "qkv"), "biased": (HEADS, "qkv"),
    "fixed_bias": (SIZE, "qkv"), "separate": (HEADS, "q"), "grouped": (2, "q"), "torchs_own": (HEADS, ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_cut_or_parts_of_them_where_heads_cannot(kind: str) -> None:
    torch.manual_seed(0)
    model = Attention(kind).eval()
    x = torch.randn(2, TOKENS, WIDTH)
    known = coupling(model, x)
    count, maker = KINDS[kind]
    own = next(b for b in known.bundles if any(path == maker for path, _ in b.members) or not maker)
    assert len(own.classes) == count
    for seed in (0, 1):
        removed = half(known, seed)
        small = replayed(model, known, removed)
        with torch.no_grad():
            expected = zeroed(model, known.kept(removed))(x)
            torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(small(x[:1]), expected[:1], rtol=1e-4, atol=1e-5)
    exported = export(small, x).module()
    torch.testing.assert_close(exported(x), small(x), rtol=1e-4, atol=1e-5)


class Bare(nn.Module):
    """Layer scale, a class token, a table of positions, a constant, and a weight without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(3, 8, bias=False), nn.Linear(8, 10), nn.Linear(10, 8)
        self.gamma, self.token, self.places = (
            nn.Parameter(torch.randn(*shape)) for shape in ((8,), (1, 1, 8), (1, TOKENS + 1, 8))
        )
        self.head, self.fc = nn.Parameter(torch.randn(6, 8)), nn.Linear(6, 2)
        self.register_buffer("sign", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x) * self.sign], 1) + self.places
        x = x + self.gamma * self.down(torch.relu(self.up(x)))
        return self.fc(F.linear(x[:, 0] * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]), self.head))


def test_bare_parameters_and_constants_are_cut() -> None:
    torch.manual_seed(0)
    model, x = Bare().eval(), torch.randn(2, TOKENS, 3)
    known = coupling(model, x)
    assert set(known.frozen) == {"fc"}
    assert [len(bundle.classes) for bundle in known.bundles] == [8, 10, 6]
    assert ("places", "dim2") in known.bundles[0].tensors
    removed = half(known, 0)
    small = replayed(model, known, removed)
    assert {name: tuple(value.shape) for name, value in small.named_parameters()} == {
        "embed.weight": (4, 3), "up.weight": (5, 4), "up.bias": (5,), "down.weight": (4, 5), "down.bias": (4,),
        "gamma": (4,), "token": (1, 1, 4), "places": (1, 6, 4), "head": (3, 4), "fc.weight": (2, 3), "fc.bias": (2,),
    }  # fmt: skip
    kept = {path: roles for path, roles in known.kept(removed).items() if not path.startswith("constant")}
    with torch.no_grad():
        torch.testing.assert_close(small(x), zeroed(model, kept)(x), rtol=1e-4, atol=1e-5)


def test_masks_are_cut_with_the_weights_under_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    for layer in (model[0], model[2]):
        parametrize.register_parametrization(layer, "weight", Mask(layer.weight.shape))
        layer.parametrizations.weight[0].mask.copy_(torch.rand(layer.weight.shape) > 0.3)
    x = torch.randn(3, 6)
    known = coupling(model, x)
    removed = np.concatenate([bundle.classes[:2] for bundle in known.bundles])
    small = replayed(model, known, removed)
    assert small[2].parametrizations.weight.original.shape == small[2].parametrizations.weight[0].mask.shape == (2, 6)
    inner = torch.relu(F.linear(x, model[0].weight[2:], model[0].bias[2:]))
    inner = torch.relu(F.linear(inner, model[2].weight[2:, 2:], model[2].bias[2:]))
    torch.testing.assert_close(small(x), F.linear(inner, model[4].weight[:, 2:], model[4].bias))


def test_a_traced_plan_gives_the_same_keys_and_trains() -> None:
    model, x = Attention("by_hand").eval(), torch.randn(2, TOKENS, WIDTH)
    known = coupling(model, x)
    plan = known.plan(model, half(known, 0))
    assert plan["traced"] == [{"shape": [2, TOKENS, WIDTH], "dtype": "float32"}]
    first, second = recut(copy.deepcopy(model), plan), recut(Attention("by_hand").eval(), plan)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(x), second(x))
    first.train()(x).sum().backward()
    assert first.get_submodule("qkv").weight.grad is not None


def test_an_impossible_traced_plan_is_refused() -> None:
    model, x = Attention("by_hand").eval(), torch.randn(2, TOKENS, WIDTH)
    known = coupling(model, x)
    plan = known.plan(model, half(known, 0))
    before = copy.deepcopy(model.state_dict())
    plan["kept"]["proj"]["in"] = plan["kept"]["proj"]["in"][1:]
    with pytest.raises(SurgeryError, match="must lose what is coupled"):
        recut(model, plan)
    plan["kept"] = {"fc": {"out": [0]}}
    with pytest.raises(SurgeryError, match="model's output"):
        recut(model, plan)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_two_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(3, 8), nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"sum": self.fc((self.a(x) + self.b(y)).view(-1, 8))}

    model, inputs = Two().eval(), (torch.randn(2, 3), torch.randn(2, 5))
    known = coupling(model, inputs)
    removed = half(known, 0)
    small = replayed(model, known, removed)
    torch.testing.assert_close(small(*inputs)["sum"], zeroed(model, known.kept(removed))(*inputs)["sum"])


class TrainingHead(nn.Module):
    """A second head that only training uses, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)
        self.second = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x).relu()
        return (self.head(x), self.second(x)) if self.training else self.head(x)


def test_heads_of_training_go_with_the_graph() -> None:
    """A cut does not reach what the evaluation does not use, so the evaluation takes the model's place."""
    model = TrainingHead().eval()
    x = torch.randn(2, 3, 8, 8)
    known = coupling(model, x)
    (bundle,) = known.bundles
    plan = known.plan(model, bundle.classes[::2])
    assert "traced" in plan
    cut = recut(model, plan)
    cut.train()
    assert cut(x).shape == (2, 4, 8, 8)
    assert cut.get_submodule("body").weight.shape == (4, 3, 3, 3)
    assert known.plan(TrainingHead().eval(), []) == {"kept": {}}


class Remembering(nn.Module):
    """Keeps what it computes in evaluation, as attention biases are kept in TinyViT and EfficientFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bias = nn.Parameter(torch.randn(8, 1, 1))
        self.head = nn.Conv2d(8, 2, 1)
        self.kept: dict[str, Tensor] = {}
        self.seen = [1]

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias * 2
        self.last = x
        self.seen.append(2)
        return self.head(self.conv(x) + self.kept["bias"])


def test_capturing_leaves_nothing_behind() -> None:
    model = Remembering().eval()
    x = torch.randn(2, 3, 8, 8)
    coupling(model, x)
    assert (model.kept, model.seen) == ({}, [1])
    assert not hasattr(model, "last")  # which the forward assigned


def test_what_a_forward_keeps_is_no_constant() -> None:
    model = Remembering().eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model(x)
    assert model.kept
    known = coupling(model, x)
    assert model.kept  # put back
    assert any(role == "dim0" for _, role in known.slots)
    (bundle,) = known.bundles
    plan = known.plan(model, bundle.classes[::2])
    cut = recut(Remembering().eval(), plan)
    assert cut(x).shape == (2, 2, 8, 8)
    again = recut(Remembering().eval(), json.loads(json.dumps(plan)))
    again.load_state_dict(cut.state_dict())
    torch.testing.assert_close(again.eval()(x), cut.eval()(x))
