"""Costs against hand counts: the published architectures by the formulas of their papers, small nets written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from tersenet.bricks.brick import Brick
from tersenet.graph.costs import costs, peak_activation_bytes, totals
from tersenet.graph.trace import trace
from tersenet.models import build


def residual_macs(bottleneck: bool, depths: tuple[int, ...], size: int = 224) -> int:
    """He et al., arXiv:1512.03385, table 1, stride in the 3x3 convolution as torchvision has it."""
    side, total, inputs = size // 2, 3 * 64 * 49 * (size // 2) ** 2, 64
    side //= 2
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        outputs = width * (4 if bottleneck else 1)
        for block in range(depth):
            before = side
            side = side // 2 if stage and not block else side
            if bottleneck:
                total += before**2 * inputs * width + side**2 * width * width * 9 + side**2 * width * outputs
            else:
                total += side**2 * (inputs + width) * width * 9
            if inputs != outputs:
                total += side**2 * inputs * outputs
            inputs = outputs
    return total + inputs * 1000


def cifar_macs(depth: int) -> int:
    """Section 4.2 of the same paper: 6n + 2 layers of 16, 32 and 64 channels at 32, 16 and 8 pixels."""
    blocks = (depth - 2) // 6
    total = 3 * 16 * 9 * 32**2 + 64 * 10
    for stage, (width, side) in enumerate(((16, 32), (32, 16), (64, 8))):
        first = width // 2 if stage else width
        total += 9 * side**2 * width * (first + (2 * blocks - 1) * width)
    return total


def vgg16() -> tuple[int, int]:
    """(parameters, macs) of configuration D of Simonyan & Zisserman, arXiv:1409.1556."""
    parameters = macs = 0
    side, inputs = 224, 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            parameters += inputs * width * 9 + width
            macs += inputs * width * 9 * side**2
            inputs = width
        side //= 2
    for inputs, outputs in ((512 * 49, 4096), (4096, 4096), (4096, 1000)):
        parameters += inputs * outputs + outputs
        macs += inputs * outputs
    return parameters, macs


def mobilenet_v2() -> tuple[int, int]:
    """(parameters, macs) of table 2 of Sandler et al., arXiv:1801.04381."""
    side, inputs = 112, 32
    parameters, macs = 3 * 32 * 9 + 2 * 32, 3 * 32 * 9 * side**2
    rows = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expand, outputs, repeats, stride in rows:
        for block in range(repeats):
            hidden = inputs * expand
            if expand > 1:
                parameters, macs = parameters + inputs * hidden + 2 * hidden, macs + inputs * hidden * side**2
            side = side // stride if not block else side
            parameters += 9 * hidden + 2 * hidden + hidden * outputs + 2 * outputs
            macs += (9 * hidden + hidden * outputs) * side**2
            inputs = outputs
    parameters += 320 * 1280 + 2 * 1280 + 1280 * 1000 + 1000
    return parameters, macs + 320 * 1280 * side**2 + 1280 * 1000


REFERENCES = [
    ("resnet18", 224, 11_689_512, 1_814_073_344, lambda: residual_macs(False, (2, 2, 2, 2))),
    ("resnet50", 224, 25_557_032, 4_089_184_256, lambda: residual_macs(True, (3, 4, 6, 3))),
    ("vgg16", 224, 138_357_544, 15_470_264_320, lambda: vgg16()[1]),
    ("mobilenet_v2", 224, 3_504_872, 300_774_272, lambda: mobilenet_v2()[1]),
    ("resnet56", 32, 853_018, 125_485_696, lambda: cifar_macs(56)),
    ("resnet20", 32, 269_722, 40_551_040, lambda: cifar_macs(20)),
]


@pytest.mark.parametrize(("name", "size", "params", "macs", "formula"), REFERENCES, ids=[row[0] for row in REFERENCES])
def test_reference_models_have_the_published_counts(name, size, params, macs, formula) -> None:
    with torch.device("meta"):
        model = build(name)
    example = torch.zeros(1, 3, size, size, device="meta")
    total = totals(model, example)
    assert formula() == macs
    assert (total.params, total.macs, total.flops) == (params, macs, 2 * macs)
    assert total.param_bytes == 4 * params
    rows = costs(model, example)
    assert sum(row.params for row in rows) == params
    assert sum(row.macs for row in rows if row.kind in ("Conv2d", "Linear")) == macs


def test_the_formulas_for_parameters_agree() -> None:
    assert vgg16()[0] == 138_357_544
    assert mobilenet_v2()[0] == 3_504_872


def by_path(model: nn.Module, example: Tensor) -> dict[str, tuple]:
    return {row.path or row.kind: row for row in costs(model, example)}


def test_grouped_transposed_and_biased_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False),  # 8 x 6 x 6 results of 2 x 9 products
        nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2),  # 8 x 6 x 6 inputs meet 3 x 4 weights
        nn.Conv2d(6, 2, (1, 3)),
        nn.Flatten(),
        nn.Linear(2 * 12 * 10, 5),
    )
    rows = by_path(model, torch.randn(1, 4, 6, 6))
    assert [rows[path].macs for path in "0124"] == [288 * 18, 288 * 12, 240 * 18, 1200]
    assert rows["0"].additions == 288 * 17  # 18 terms, no bias
    assert rows["4"].additions == 1200  # 240 terms and a bias
    assert "3" not in rows
    assert rows["4"].bytes_moved == 4 * (240 + 5 + 1205)
    assert rows["0"].output_shape == (1, 8, 6, 6)


def test_batch_of_the_example_does_not_matter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert len({totals(model, torch.randn(batch, 3, 8, 8)) for batch in (1, 2, 5)}) == 1


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.layer(self.layer(x)))


def test_a_layer_used_twice_counts_its_macs_twice_and_its_parameters_once() -> None:
    rows = by_path(Twice(), torch.randn(2, 6))
    assert (rows["layer"].macs, rows["layer"].params, rows["layer"].bytes_moved) == (72, 42, 2 * 4 * (6 + 6 + 42))
    assert (rows["tied"].macs, rows["tied"].params, rows["tied"].param_bytes) == (36, 6, 24)
    assert totals(Twice(), torch.randn(2, 6)).params == 48


class Products(nn.Module):
    """Attention of 2 heads over 5 tokens of width 8, by hand and by torch, and other matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x)[0]
        heads = x.reshape(-1, 5, 2, 4).transpose(1, 2)
        y = F.scaled_dot_product_attention(heads, heads, heads)
        scores = torch.einsum("...qc,...kc->...qk", y, heads)
        return (scores @ heads).mean((1, 2)) * self.scale[:4]


def test_matrix_products() -> None:
    rows = {(row.path, row.kind): row for row in costs(Products(), torch.randn(3, 5, 8))}
    assert rows["attention", "linear"].macs == 5 * 8 * 24
    (out,) = (row for (path, _), row in rows.items() if path == "attention.out_proj")
    assert out.macs == 5 * 8 * 8
    assert rows["attention", "bmm"].macs == 2 * 2 * 5 * 5 * 4
    assert rows["", "scaled_dot_product_attention"].macs == 2 * 2 * 5 * 5 * 4
    assert rows["", "einsum"].macs == rows["", "matmul"].macs == 2 * 5 * 5 * 4
    assert rows["", "mean"].additions == 2 * 5 * 4 - 4
    assert rows["", "mul"].params == 0  # the parameter is sliced first: no operator that counts reads it directly
    assert totals(Products(), torch.randn(3, 5, 8)).params == sum(p.numel() for p in Products().parameters())


class Einsum(nn.Module):
    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation
        self.matrix = nn.Parameter(torch.ones(4, 6))
        self.vector = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, self.matrix, self.vector)


def test_einsum_contracts_from_left_to_right() -> None:
    # (3, 4) x (4, 6): 72 products per sample; then the 6 are summed against the vector: 18.
    assert totals(Einsum("nij,jk,k->ni"), torch.randn(2, 3, 4)).macs == 72 + 18


# torch.export warns about the flat weights that torch.nn.LSTM keeps for cuDNN; nothing is lost by it.
@pytest.mark.filterwarnings("ignore:The tensor attributes self.layer._flat_weights:UserWarning")
def test_recurrent_layers_multiply_each_matrix_once_per_step() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(6, 5, num_layers=2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0][:, -1]

    assert totals(Last(), torch.randn(2, 7, 6)).macs == 7 * 4 * 5 * ((6 + 5) + (5 + 5))


class Int8Linear(Brick):
    """A quantized layer: int8 weight, float scales, arithmetic of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 4
        self.register_buffer("weight", torch.ones(4, 6, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(4, 1))
        self.register_buffer("bias", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.round(), self.weight * self.scale, self.bias)


class LowRank(Brick):
    """Says in_features and out_features too, but is no dense layer."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = 6, 4, None
        self.rank = rank
        self.right, self.left = nn.Parameter(torch.ones(rank, 6)), nn.Parameter(torch.ones(4, rank))

    def config(self) -> dict[str, int]:
        return {"rank": self.rank}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.right), self.left)


def test_bricks_count_what_they_stand_for() -> None:
    quantized = totals(Holder(Int8Linear()), torch.randn(2, 6))
    assert (quantized.params, quantized.param_bytes) == (28, 24 + 16 + 16)
    assert (quantized.macs, quantized.multiplications) == (24, 24)
    for rank in (1, 2):
        thin = totals(Holder(LowRank(rank)), torch.randn(2, 6))
        assert (thin.params, thin.macs, thin.additions) == (10 * rank, 10 * rank, 5 * rank + 4 * (rank - 1))
    pair = nn.Sequential(LowRank(2), nn.Linear(4, 6), LowRank(2), nn.Linear(4, 6), LowRank(1))
    assert totals(pair, torch.randn(2, 6)).macs == 20 + 24 + 20 + 24 + 10


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


def test_a_parametrized_layer_counts_as_the_layer() -> None:
    layer = nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(layer, "weight", Half())
    (row,) = costs(Holder(layer), torch.randn(2, 3, 5, 5))
    assert (row.kind, row.params, row.macs) == ("Conv2d", 112, 4 * 9 * 27)


def test_norms_and_activations_have_no_macs() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Hardswish(), nn.AvgPool2d(2), nn.Sigmoid(), nn.MaxPool2d(2))
    rows = by_path(model, torch.randn(2, 2, 4, 4))
    assert [(rows[path].multiplications, rows[path].additions) for path in "01234"] == [
        (32, 32), (64, 32), (8, 24), (16, 8), (0, 0),
    ]  # fmt: skip
    assert totals(model, torch.randn(2, 2, 4, 4)).macs == 0


class Peak(nn.Module):
    """x (4) -> a (8), b (16) from a, then c (2) from b, added to a view of a: by hand the peak is b with a and x."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.relu = nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.relu(self.b(a))
        return self.c(b) + a.view(-1, 8)


def test_peak_activation_is_that_of_the_liveness_walk() -> None:
    # a, b and relu(b) out of place: 8 + 16 + 16; in place: c, b and a: 8 + 16 + 8
    assert totals(Peak(inplace=False), torch.randn(3, 4)).peak_activation_bytes == 4 * 40
    assert totals(Peak(inplace=True), torch.randn(3, 4)).peak_activation_bytes == 4 * 32


def test_views_keep_their_source_alive() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            left, right = x.chunk(2, dim=1)
            return torch.cat([left.exp().exp(), right.transpose(1, 1)], dim=1)

    graph = trace(Views(), torch.randn(2, 8))
    # x (8) lives until the concatenation because `right` does: x, exp (4), and its result (8)
    assert peak_activation_bytes(graph) == 4 * (8 + 4 + 8)
    assert {row.kind for row in costs(Views(), torch.randn(2, 8))} == {"exp", "cat"}


def test_the_peak_is_the_largest_of_brute_force() -> None:
    """A chain of linear layers holds two neighbours at a time."""
    widths = [3, 17, 5, 29, 11, 2]
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    assert totals(model, torch.randn(2, 3)).peak_activation_bytes == 4 * max(
        a + b for a, b in itertools.pairwise(widths)
    )


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.BatchNorm1d(3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    totals(model, torch.randn(4, 3))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table.exp()


def test_work_on_parameters_alone_does_not_grow_with_the_batch() -> None:
    rows = {row.kind: row for row in costs(Table(), torch.randn(2, 8))}
    assert (rows["exp"].multiplications, rows["exp"].params, rows["exp"].bytes_moved) == (8, 8, 4 * 16)
    assert (rows["add"].additions, rows["add"].bytes_moved) == (8, 4 * 24)
