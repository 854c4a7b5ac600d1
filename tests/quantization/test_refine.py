"""Repaired and learned rounding, kept means, even channels: each against what it is meant to beat."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from tersenet.bricks.mask import Mask, mask_of
from tersenet.bricks.quantized import QuantizedLayer
from tersenet.bricks.quantizer import Quantizer
from tersenet.errors import InputWarning, TraceError
from tersenet.findings import collecting
from tersenet.graph.trace import trace
from tersenet.quantization.equalise import equalise, find_pairs
from tersenet.quantization.quantize import NOTHING_TO_REPAIR_ON, Quantize
from tersenet.quantization.verdicts import look
from tersenet.task import Task


class Chain3(nn.Module):
    """Convolution, depthwise convolution, convolution and a linear layer, ReLUs between them."""

    def __init__(self, clip: bool = False) -> None:
        super().__init__()
        self.first, self.deep = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.last, self.linear = nn.Conv2d(12, 16, 1), nn.Linear(16, 5)
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        cut = F.relu6 if self.clip else F.relu
        x = cut(self.deep(cut(self.first(x))))
        return self.linear(F.relu(self.last(x)).mean((2, 3)))


def chain(clip: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Chain3(clip).eval()


# Neighbouring pixels alike, as in images, so that inputs of a kernel are correlated.
X = F.avg_pool2d(torch.randn(64, 3, 14, 14, generator=torch.Generator().manual_seed(1)), 3, 1) * 3
TEST = F.avg_pool2d(torch.randn(64, 3, 14, 14, generator=torch.Generator().manual_seed(2)), 3, 1) * 3
TASK = Task(example=X[:2], calibrate=[(X, torch.zeros(64))], quiet=True)


def error(step: Quantize, model: nn.Module) -> float:
    with torch.no_grad():
        wanted = model(TEST)
        made, _ = step.run(copy.deepcopy(model), TASK)
        return float((made.eval()(TEST) - wanted).square().mean() / wanted.var())


@pytest.mark.parametrize("weights", ["int3", "int4"])
@pytest.mark.parametrize("rounding", ["repaired", "learned"])
def test_better_than_rounding_to_nearest(weights: str, rounding: str) -> None:
    plain = error(Quantize(weights=weights, rounding="nearest"), chain())
    assert error(Quantize(weights=weights, rounding=rounding, correct_bias=True), chain()) < 0.6 * plain


@pytest.mark.parametrize("weights", ["int3", "kmeans3", "pot4", "binary3", "ternary", "fp8_e5m2"])
def test_repaired_codes_are_better_too(weights: str) -> None:
    settings = {"weights": weights, "activations": None}
    plain = error(Quantize(**settings, rounding="nearest"), chain())
    assert error(Quantize(**settings, rounding="repaired", correct_bias=True), chain()) < plain


@pytest.mark.parametrize("activations", ["int8", None])
def test_means_are_kept(activations: str | None) -> None:
    model = chain()
    shifts = []
    for correct in (False, True):
        step = Quantize(weights="int3", activations=activations, rounding="nearest", correct_bias=correct)
        made, _ = step.run(copy.deepcopy(model), TASK)
        shifts.append(float((made.eval()(X).detach().mean(0) - model(X).detach().mean(0)).abs().max()))
    assert shifts[1] < 0.3 * shifts[0]


def test_norms_follow_where_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model.train()(X)
    model.eval()
    shifts = []
    for correct in (False, True):
        step = Quantize(weights="ternary", activations=None, rounding="nearest", correct_bias=correct)
        made, _ = step.run(copy.deepcopy(model), TASK)
        shifts.append(float((made[:2](X) - model[:2](X)).detach().mean((0, 2, 3)).abs().max()))
    assert shifts[1] < 0.05 * shifts[0]


def numbers(model: nn.Module) -> list[Tensor]:
    return [value.detach() for value in model.state_dict().values()]


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = list(zip(numbers(one), numbers(other), strict=True))
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def made_of(task: Task = TASK, **settings: Any) -> nn.Module:
    return Quantize(**settings).run(chain(), task)[0]


@pytest.mark.parametrize("activations", ["int8", None])
@pytest.mark.parametrize(
    ("weights", "rounding", "correct_bias"), [("int8", "nearest", False), ("int7", "repaired", True)]
)
def test_few_bits_are_repaired_by_default(
    weights: str, rounding: str, correct_bias: bool, activations: str | None
) -> None:
    settings = {"weights": weights, "activations": activations}
    wanted = made_of(**settings, rounding=rounding, correct_bias=correct_bias)
    assert same(made_of(**settings), wanted)
    for other in ("nearest", "repaired"):
        assert same(made_of(**settings, rounding=other), wanted) == (other == rounding)
    assert not same(made_of(**settings, correct_bias=not correct_bias), wanted)


@pytest.mark.parametrize("weights", ["fp8_e4m3", "bf16", "kmeans8", "pot8"])
def test_codes_of_eight_bits_and_more_go_to_the_nearest_by_default(weights: str) -> None:
    plain = made_of(weights=weights, activations=None, rounding="nearest")
    assert same(made_of(weights=weights, activations=None), plain)


@pytest.mark.parametrize("weights", ["kmeans3", "ternary", "binary2", "pq", "pot4"])
def test_codes_of_few_bits_are_repaired_by_default(weights: str) -> None:
    settings = {"weights": weights, "activations": None}
    assert same(made_of(**settings), made_of(**settings, rounding="repaired"))
    assert not same(made_of(**settings), made_of(**settings, rounding="nearest"))


def test_by_default_only_the_layers_of_few_bits_are_repaired() -> None:
    mixed = {"weights": "int8", "formats": {"last": "int3"}}
    by_default = dict(made_of(**mixed).named_modules())["last"]
    assert torch.equal(by_default.weight, by_default.rounded_weight())  # type: ignore[operator]
    first = dict(made_of(**mixed).named_modules())["first"]
    plain = dict(made_of(weights="int8", rounding="nearest").named_modules())["first"]
    assert torch.equal(first.weight, plain.weight)  # type: ignore[arg-type]


def test_without_inputs_weights_go_to_the_nearest_and_it_is_said() -> None:
    bare = Task(example=X[:2], quiet=True)
    settings = {"weights": "int4", "activations": None}
    assert Quantize(**settings).data_needed() == "nothing"
    assert Quantize(**settings, rounding="repaired").data_needed() == "inputs"
    with collecting() as said:
        by_default = made_of(bare, **settings)
    assert said == [NOTHING_TO_REPAIR_ON]
    with collecting() as said:
        assert same(made_of(bare, **settings, rounding="nearest"), by_default)
        made_of(bare, weights="int8", activations=None)
    assert said == []


class Branching(Chain3):
    """Cannot be captured: what it computes depends on the values that it reads."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.detach().sum()) > 0 else -x)


def test_a_model_that_cannot_be_captured_goes_to_the_nearest_by_default_alone() -> None:
    settings = {"weights": "int4", "activations": None}
    torch.manual_seed(0)
    model = Branching()
    with collecting() as said:
        made, _ = Quantize(**settings).run(copy.deepcopy(model), TASK)
    assert any(text.startswith("the rounding of weights cannot be repaired, so each went to") for text in said), said
    assert same(made, Quantize(**settings, rounding="nearest").run(copy.deepcopy(model), TASK)[0])
    with pytest.raises(TraceError):
        Quantize(**settings, rounding="repaired").run(model, TASK)


@pytest.mark.parametrize("weights", ["int4", "kmeans3", "ternary"])
@pytest.mark.parametrize("rounding", ["repaired", "learned"])
def test_masked_weights_stay_zero(weights: str, rounding: str) -> None:
    model = chain()
    parametrize.register_parametrization(model.last, "weight", Mask(model.last.weight.shape))
    mask = mask_of(model.last)
    assert mask is not None
    mask.mask[:, ::2] = False
    made, _ = Quantize(weights=weights, activations=None, rounding=rounding).run(model, TASK)
    weight = made.last.rounded_weight().detach()  # type: ignore[union-attr, operator]
    assert bool((weight[:, ::2] == 0).all())
    assert bool((weight[:, 1::2] != 0).any())


def test_repaired_weights_are_on_the_grid_that_ships() -> None:
    made, _ = Quantize(weights="int4", rounding="repaired", correct_bias=True).run(chain(), TASK)
    for layer in made.modules():
        if isinstance(layer, QuantizedLayer):
            torch.testing.assert_close(layer.rounded_weight(), layer.weight, rtol=0, atol=1e-6)
            assert int(layer.settled().weight.abs().max()) <= 7


def test_zero_channels_and_constant_inputs_do_no_harm() -> None:
    model = chain()
    with torch.no_grad():
        model.first.weight[2] = 0
        model.last.weight.zero_()
    flat = Task(example=X[:2], calibrate=[(torch.full_like(X, 0.5), torch.zeros(64))], quiet=True)
    for task in (TASK, flat):
        for weights in ("int4", "kmeans4"):
            activations = "int8" if weights == "int4" else None
            step = Quantize(
                weights=weights, activations=activations, rounding="repaired", correct_bias=True, equalise=True
            )
            with pytest.warns(InputWarning, match="one plain color") if task is flat else contextlib.nullcontext():
                made, _ = step.run(copy.deepcopy(model), task)
            assert bool(torch.isfinite(made.eval()(X)).all())


def test_equalising_changes_no_output_and_evens_out_channels() -> None:
    model = chain()
    with torch.no_grad():
        model.first.weight[3] *= 50
        model.first.bias[3] *= 50
        model.deep.weight[3] /= 50
    before = model(X)
    graph = trace(model, X[:2])
    assert [(pair.first, pair.second) for pair in find_pairs(graph)] == [("first", "deep"), ("deep", "last")]
    assert equalise(graph) == 2
    torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-5)
    sizes = model.first.weight.detach().abs().amax((1, 2, 3))
    assert float(sizes.max() / sizes.median()) < 10


def test_equalised_depthwise_channels_lose_less() -> None:
    model = chain(clip=True)
    with torch.no_grad():
        scale = torch.logspace(-2, 1, 12).reshape(-1, 1, 1, 1)
        model.first.weight.mul_(scale)
        model.deep.weight.div_(scale)
        model.first.bias.mul_(scale.flatten())
    unclipped = chain()
    unclipped.load_state_dict(model.state_dict())
    plain, evened = error(Quantize(), unclipped), error(Quantize(equalise=True), unclipped)
    assert evened < 0.5 * plain
    _, plan = Quantize(equalise=True).run(model, TASK)
    assert len(plan["unclipped"]) == 2, "clips at 6 become ReLUs"


def test_a_ruined_layer_and_a_cut_range_are_named() -> None:
    model = chain()
    with torch.no_grad():
        model.last.weight[:, 0] *= 300  # one input channel decides the range
        model.last.weight[:, 0] *= torch.sign(torch.randn(16, 1, 1))
        model.deep.weight[0] *= 1e-3
        model.deep.bias[0] = 0
    made, _ = Quantize(weights="int3", rounding="nearest").run(model, TASK)
    said = look(made, TASK).verdicts()
    assert any(text.startswith("last") and "rounding of its weights to 3 bits" in text for text in said), said
    made, _ = Quantize().run(chain(), TASK)
    assert look(made, TASK).verdicts() == []
    path, grid = next((path, m) for path, m in made.named_modules() if isinstance(m, Quantizer) and "relu" in path)
    grid.scale.mul_(0.1)
    said = look(made, TASK).verdicts()
    assert any(path.rpartition(".")[2].removesuffix("_out") in text and "cuts off" in text for text in said), said
