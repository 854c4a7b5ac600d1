"""Quantization: replay, calibration, and what cannot be quantized."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases import batches, task_for, tiny
from tersenet.bricks.quantized import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from tersenet.bricks.quantizer import Quantizer
from tersenet.bricks.shortcut import PadShortcut
from tersenet.errors import DataError, InputWarning, ModelError, NoEffect, SettingsError
from tersenet.quantization.quantize import Quantize
from tersenet.quantization.quantize_aware import QuantizeAware
from tersenet.step import Step
from tersenet.task import Task


class Residual(nn.Module):
    """A tiny net with all that the CIFAR ResNets have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.shortcut = PadShortcut(2, 2, 2)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + self.shortcut(x))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def residual(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Residual()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def task_of(x: Tensor = X) -> Task:
    return Task(example=X[:2], calibrate=[(part, torch.zeros(len(part))) for part in x.split(8)], quiet=True)


@pytest.mark.parametrize("settings", [{}, {"ranges": "minmax"}, {"ranges": "percentile"}, {"activations": None}])
def test_near_to_the_original_and_replayed_exactly(settings: dict) -> None:
    before = residual()(X).detach()
    step = Quantize(**settings)
    model, plan = step.run(residual(), task_of())
    assert float((model(X).detach() - before).abs().max()) < 0.05 * float(before.abs().max())
    assert not torch.equal(model(X), before)
    plan = json.loads(json.dumps(plan))
    replayed = step.apply(residual(seed=7), plan)
    replayed.load_state_dict(model.state_dict())
    assert torch.equal(replayed.eval()(X), model(X))


def test_planning_changes_nothing() -> None:
    model = residual()
    before = copy.deepcopy(model)
    plan = Quantize().plan(model, task_of())
    assert plan == Quantize().plan(model, task_of())
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in model.state_dict().items())


def test_where_the_points_are() -> None:
    model, plan = Quantize().run(residual(), task_of())
    assert set(plan["layers"]) == {"conv1", "conv2", "shortcut", "linear"}
    assert plan["float"] == {}
    # input; after ReLU with the shortcut's copy; conv2; after the addition's ReLU; pooling with its flattened copy.
    assert [len(members) for members in plan["points"].values()] == [1, 2, 1, 1, 2]
    quantizers = {path: m for path, m in model.named_modules() if isinstance(m, Quantizer)}
    assert set(quantizers) == {f"quantizers.{name}" for name in plan["points"]}
    relu = [int(m.zero_point) for path, m in quantizers.items() if "relu" in path]
    assert relu == [0, 0]


def test_minmax_covers_exactly_what_was_seen() -> None:
    model, _ = Quantize(ranges="minmax").run(residual(), task_of())
    first = next(m for path, m in model.named_modules() if path.startswith("quantizers.") and isinstance(m, Quantizer))
    # The input lies around 0: 128 steps below and 127 above, the further end exactly.
    assert float(first.scale) == pytest.approx(max(-float(X.min()) / 128, float(X.max()) / 127), rel=1e-6)


def test_input_scales_are_those_of_the_quantizers_in_front() -> None:
    model, _ = Quantize().run(residual(), task_of())
    for node in model.graph.nodes:
        layer = model.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(layer, QuantizedLayer):
            assert torch.equal(layer.input_scale, model.get_submodule(node.args[0].target).scale)


def test_training_keeps_the_scales_and_lowers_the_loss() -> None:
    model, _ = Quantize().run(residual(), task_of())
    scales = {key: value.clone() for key, value in model.state_dict().items() if "scale" in key or "zero" in key}
    target = torch.arange(16) % 5
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in scales.items())


def test_a_channel_of_zeros_with_a_large_bias_fits_into_int32() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].weight[2] *= 1e-20
        model[0].bias[1:3] = 100.0
    model, _ = Quantize().run(model, task_of())
    settled = model.get_submodule("0").settled()
    assert float((settled.rounded_bias().detach() - 100.0).abs()[1:3].max()) < 1e-3


def test_constant_and_zero_activations() -> None:
    for constant in (0.0, 2.0):
        model = residual()
        x = torch.full((4, 3, 8, 8), constant)
        before = model(x)
        with pytest.warns(InputWarning, match="one plain color"):
            model, _ = Quantize().run(model, task_of(x))
        torch.testing.assert_close(model(x), before, rtol=0.05, atol=0.05)


def test_a_layer_called_twice_has_one_grid_at_its_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x)).mean((2, 3))

    model, plan = Quantize().run(Twice(), task_of())
    assert next(iter(plan["points"].values())) == ["x", "conv"]
    assert model(X).shape == (16, 3)


def test_float_layers_are_listed_with_their_reason() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up = nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 2, 2)
            self.around, self.last = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.around(F.hardswish(self.up(self.conv(x)))))

    plan = Quantize(skip=("last",)).plan(Mixed(), task_of())
    assert set(plan["layers"]) == {"conv"}
    assert {"up", "around", "last"} <= set(plan["float"])
    assert "only or skip" in plan["float"]["last"]
    assert "ConvTranspose2d" in plan["float"]["up"]
    assert "circular" in plan["float"]["around"]


def test_weights_only_touches_what_it_should_and_traces_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 2))
    made, plan = Quantize(activations=None, skip=("linear",)).run(model, Task(example=X))
    assert made is model
    assert plan == {"layers": {"0": {"weights": "int8"}}}
    assert type(model[0]) is QuantizedConv2d
    assert type(model[2]) is nn.Linear
    again, _ = Quantize(activations=None).run(nn.Linear(2, 2), Task(example=X))
    assert type(again) is QuantizedLinear


def test_quantizing_twice_says_that_nothing_is_left() -> None:
    model, _ = Quantize().run(residual(), task_of())
    before = model(X)
    with pytest.warns(NoEffect):
        model, plan = Quantize().run(model, task_of())
    assert plan == {}
    assert torch.equal(model(X), before)


def test_bad_data_and_weights_are_named() -> None:
    bad = X.clone()
    bad[9, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="calibration batch 1"):
        Quantize().run(residual(), task_of(bad))
    with pytest.raises(DataError, match="0 samples"):
        Quantize().run(residual(), Task(example=X[:2], calibrate=[]))
    for activations in ("int8", None):
        model = residual()
        with torch.no_grad():
            model.conv2.weight[0, 0, 0, 0] = torch.inf
        with pytest.raises(ModelError, match="conv2"):
            Quantize(activations=activations).run(model, task_of())
    model = residual()
    with torch.no_grad():
        model.bn1.bias[0] = 3e38
        model.bn2.weight.fill_(1e10)
    with pytest.raises(ModelError, match="not finite"):
        Quantize().run(model, task_of())


@pytest.mark.parametrize("settings", [{}, {"weights": "kmeans4", "activations": None, "rounding": "repaired"}])
def test_calibration_data_of_another_kind_is_refused(settings: dict) -> None:
    step = Quantize(**settings)
    for x, said in (
        (torch.randn(8, 1, 8, 8), "prepare both alike"),
        (torch.randn(8, 3, 9, 8), "prepare both alike"),
        (torch.randn(8, 3, 8, 8).double(), "float64"),
        (255 * torch.rand(8, 3, 8, 8), "scale pixels"),
    ):
        with pytest.raises(DataError, match=said):
            step.run(residual(), Task(example=X[:2], calibrate=[(x,)], quiet=True))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"weights": "int9"}, "int9"),
        ({"activations": "fp8"}, "fp8"),
        ({"ranges": "kl"}, "kl"),
        ({"percentile": 30.0}, "30"),
        ({"weights": "kmeans4"}, "activations: null"),
        ({"formats": {"linear": "fp16"}}, "fp16"),
        ({"formats": {"linear": "runes"}, "activations": None}, "runes"),
        ({"rounding": "up"}, "up"),
        ({"granularity": "row", "activations": None}, "row"),
        ({"granularity": 16}, "activations: null"),
        ({"symmetric": False}, "activations: null"),
        ({"pieces": 300, "activations": None}, "300"),
        ({"samples": 0}, "0"),
    ],
)
def test_settings_outside_are_refused(settings: dict, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        Quantize(**settings)


def test_a_plan_of_another_model_is_refused() -> None:
    plan = Quantize().plan(residual(), task_of())
    with pytest.raises(SettingsError, match="plan"):
        Quantize().apply(nn.Sequential(nn.Conv2d(3, 4, 3)), plan)


def test_weights_first_and_activations_later_is_both_at_once() -> None:
    model, task = residual(), task_of()
    at_once, _ = Quantize().run(copy.deepcopy(model), task)
    weights, _ = Quantize(activations=None).run(copy.deepcopy(model), task)
    later, plan = Quantize().run(weights, task)
    assert plan["layers"]
    assert torch.equal(at_once.eval()(X), later.eval()(X))


def test_matching_nothing_after_weights_leaves_the_weights() -> None:
    weights, _ = Quantize(activations=None).run(residual(), task_of())
    before = weights(X)
    with pytest.warns(NoEffect):
        after, _ = Quantize(skip=("*",)).run(weights, task_of())
    assert torch.equal(before, after(X))


def test_formats_of_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"formats names 'conv9', .* did you mean"):
        Quantize(formats={"conv9": "int4"}, activations=None).run(tiny(), task_for(tiny()))


def test_choices_are_the_layers_at_the_input() -> None:
    """What lies between two rounded values is rounded by ONNX Runtime anyway, and so is no choice."""
    model = tiny()
    task = task_for(model)
    assert Quantize().choices(model, task) == {"conv1": ["int8", "float"]}
    assert Quantize(skip=("conv1",)).choices(model, task) == {}
    assert Quantize(activations=None).choices(model, task) == {}
    step = Quantize(skip=("linear",)).chosen({"conv1": "float"})
    assert step == Quantize(skip=("linear", "conv1"))
    assert "conv1" in step.plan(model, task)["float"]
    assert Quantize().chosen({"conv1": "int8"}) == Quantize().chosen({}) == Quantize()


def test_sensitivities_are_those_of_rounding_one_layer() -> None:
    model = tiny()
    task = task_for(model)
    images = batches()[0][0]
    found = Quantize().sensitivities(model, task, images)
    assert set(found) == {"conv1"}
    assert found["conv1"]["float"] == 0.0
    assert 0 < found["conv1"]["int8"] < 0.05


def test_an_activation_module_that_is_called_again_has_a_grid_for_each_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.act = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.two(self.act(self.one(x)))).mean((2, 3)) * 2

    torch.manual_seed(0)
    model = Twice().eval()
    with torch.no_grad():
        model.one.weight.mul_(100)
        model.two.weight.div_(100)
    made, plan = Quantize(ranges="minmax").run(model, task_of())
    assert all(len(members) == 1 for members in plan["points"].values()), plan["points"]
    scales = [float(m.scale) for path, m in made.named_modules() if isinstance(m, Quantizer) and "act" in path]
    assert len(scales) == 2
    assert max(scales) > 20 * min(scales), scales


@pytest.mark.parametrize("step", [Quantize(), QuantizeAware()], ids=["quantize", "quantize_aware"])
def test_layers_that_read_constants_stay_in_float(step: Step) -> None:
    """Relative positions that layers project, one after another: no activation is rounded in front of them."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
            self.project = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8))
            self.register_buffer("places", torch.randn(1, 5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x) + self.project(self.places.expand(x.shape[0], -1, -1))).mean(1)

    torch.manual_seed(0)
    model, x = Positions().eval(), torch.randn(8, 5, 6)
    quantized, plan = step.run(copy.deepcopy(model), Task(example=x[:2], calibrate=[x], quiet=True))
    assert {path for path, why in plan["float"].items() if why.startswith("reads constants")} == {
        "project.0",
        "project.3",
    }
    assert set(plan["layers"]) == {"stem", "head"}
    torch.testing.assert_close(quantized(x), model(x), atol=0.05, rtol=0)
