"""Binary weights and activations: what becomes binary, in one stage and in two, and what the file holds."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import batches, task_for, tiny
from tersenet.bricks.binary import BinaryConv2d, ShiftedPReLU, Sign
from tersenet.bricks.few_bits import FewBitLayer
from tersenet.bricks.mask import masks
from tersenet.bricks.quantized import Int8Conv2d
from tersenet.deploy.artifact import load_terse, save_terse
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.runtimes import open_file
from tersenet.errors import ModelError, NoEffect, SettingsError
from tersenet.models.binary_resnet import BinaryResNet
from tersenet.numerics.binary import input_scales
from tersenet.pruning.prune_weights import PruneWeights
from tersenet.quantization.binarise import Binarise
from tersenet.rewrite.settle import Settle
from tersenet.task import Task
from tersenet.train import Train


@pytest.mark.parametrize("method", ["bnn", "bwn", "xnor", "react"])
def test_convolutions_between_the_edges_become_binary_and_train(method: str) -> None:
    model = tiny(0)
    task = task_for(model)
    changed, plan = Binarise(method=method).run(copy.deepcopy(model), task)  # type: ignore[arg-type]
    assert sorted(plan["layers"]) == ["block.conv", "conv2", "depthwise", "pointwise"]
    place = changed.get_submodule("conv2")
    conv = place if method == "bwn" else place.get_submodule("conv")
    assert isinstance(conv, FewBitLayer)
    if method != "bwn":
        seen: list[torch.Tensor] = []
        place.get_submodule("sign").register_forward_hook(lambda _m, _i, out: seen.append(out))
        changed(task.example)
        assert seen[0].detach().unique().tolist() == [-1.0, 1.0]
        assert abs(float(seen[0].detach().mean())) < 0.8  # behind a ReLU too
    for row in conv.rounded_weight().detach():
        assert len(row.abs().unique()) <= 1 + (method != "bnn")

    def loss() -> float:
        changed.eval()
        with torch.no_grad():
            return float(sum(F.cross_entropy(changed(x), y) for x, y in batches()))

    Train(epochs=1, learning_rate=0.01, logger="none").run(changed, task)  # the norms see the new values
    first = loss()
    Train(epochs=20, learning_rate=0.01, optimizer="adam", logger="none").run(changed, task)
    assert loss() < 0.98 * first


def test_two_stages_end_where_one_does() -> None:
    model = tiny(0)
    task = task_for(model)
    first, plan = Binarise(stage="activations").run(copy.deepcopy(model), task)
    assert set(plan["layers"].values()) == {"real"}
    layer = first.get_submodule("conv2.conv")
    assert torch.equal(layer.rounded_weight(), model.conv2.weight)
    second, plan = Binarise(stage="weights").run(first, task)
    assert plan["layers"] == {}
    assert plan["rules"]["conv2.conv"] == "magnitude_aware"
    once = Binarise().run(copy.deepcopy(model), task)[0]
    assert [(key, value.shape) for key, value in second.state_dict().items()] == [
        (key, value.shape) for key, value in once.state_dict().items()
    ]
    layer, same = second.get_submodule("conv2.conv"), once.get_submodule("conv2.conv")
    assert torch.equal(layer.rounded_weight(), same.rounded_weight())
    with pytest.warns(NoEffect):
        Binarise(stage="weights").run(second, task)


def test_masked_weights_keep_their_mask_in_the_second_stage() -> None:
    model = tiny(0)
    task = task_for(model)
    model, _ = PruneWeights(sparsity=0.5).run(model, task)
    zeros = sorted(int((~mask.mask).sum()) for mask in masks(model).values())
    for stage in ("activations", "weights"):
        model, plan = Binarise(method="xnor", stage=stage).run(model, task)
        assert plan
    assert sorted(int((~mask.mask).sum()) for mask in masks(model).values()) == zeros
    assert torch.isfinite(model.eval()(task.example)).all()


def test_signs_stand_clear_of_constant_channels() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 3)).eval()
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([[0.0, 0.0], [0.0, 1.0]]).view(2, 2, 1, 1)
        model[0].bias[:] = torch.tensor([0.3, 0.0])
    x = torch.randn(8, 2, 6, 6)
    changed, _ = Binarise(edges="float").run(model, Task(example=x[:2], calibrate=[(x,)], quiet=True))
    shift = changed[2].sign.shift.detach()
    assert float(shift[0]) == pytest.approx(0.15)
    assert float(shift[1]) == pytest.approx(float(x[:, 1].relu().mean()), rel=1e-4)


def test_xnor_scales_by_the_size_of_the_input() -> None:
    model = tiny(0)
    changed, _ = Binarise(method="xnor").run(copy.deepcopy(model), task_for(model))
    place = changed.get_submodule("conv2")
    x = torch.randn(2, 8, 12, 12)
    plain = place.conv(place.sign(x))
    torch.testing.assert_close(place(x), plain * input_scales(x, (3, 3), 2, 1))


def test_gradients_of_sign_and_rprelu() -> None:
    x = torch.tensor([[-1.5, -0.4, 0.3, 1.2]]).view(1, 1, 4).requires_grad_()
    sign = Sign(1)
    with torch.no_grad():
        sign.shift.fill_(0.1)
    y = sign(x)
    assert y.flatten().tolist() == [-1.0, -1.0, 1.0, 1.0]
    y.sum().backward()
    slopes = [0.0, 2 - 2 * 0.5, 2 - 2 * 0.2, 0.0]
    assert x.grad.flatten().tolist() == pytest.approx(slopes)
    assert float(sign.shift.grad) == pytest.approx(-sum(slopes))
    act = ShiftedPReLU(1)
    with torch.no_grad():
        act.before.fill_(0.5)
        act.after.fill_(2.0)
    assert act(torch.tensor([[[-0.5, 1.5]]])).flatten().tolist() == pytest.approx([1.75, 3.0])


@pytest.mark.minutes
def test_the_binary_network_trains_in_two_stages_and_its_files_agree(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: nn.Module = BinaryResNet(width=8, blocks=2)
    data = [(torch.randn(16, 3, 16, 16), torch.randint(10, (16,))) for _ in range(2)]
    task = Task(example=data[0][0][:2], train=data, calibrate=data, quiet=True)
    Train(epochs=2, optimizer="adam", learning_rate=2e-3, logger="none").run(model, task)
    model, plan = Binarise(stage="weights").run(model, task)
    assert len(plan["rules"]) == 6
    Train(epochs=2, optimizer="adam", learning_rate=2e-3, logger="none").run(model, task)
    expected = model.eval()(data[0][0]).detach()
    settled = Settle().run(copy.deepcopy(model), task)[0].eval()
    layers = [layer for layer in settled.modules() if isinstance(layer, Int8Conv2d)]
    assert len(layers) == 6
    assert all(layer.weight.unique().tolist() == [-1, 1] for layer in layers)
    torch.testing.assert_close(settled(data[0][0]), expected, rtol=1e-4, atol=1e-4)
    onnx = export_onnx(model, task.example, tmp_path / "m.onnx")
    for runtime in ("onnxruntime", "openvino"):
        found = torch.from_numpy(open_file(onnx, runtime).run(data[0][0].numpy()))
        # A value within rounding of 0 may take the other sign; most outputs have none.
        error = (found - expected).abs().flatten(1).amax(dim=1) / expected.abs().max()
        assert float(error.median()) < 1e-3, runtime
    terse = save_terse(settled, task.example, tmp_path / "m.terse")
    torch.testing.assert_close(load_terse(terse)(data[0][0]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "two"}, "method must be one of bnn, bwn, xnor, react, got 'two'"),
        ({"stage": "third"}, "stage must be both, activations or weights, got 'third'"),
        ({"edges": "int8"}, "edges must be float or same, got 'int8'"),
        ({"method": "bwn", "stage": "activations"}, "bwn has float activations"),
    ],
)
def test_bad_settings_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Binarise(**settings)


def test_bad_weights_and_plans_are_refused() -> None:
    model = tiny(0)
    task = task_for(model)
    plan = Binarise(stage="activations").plan(model, task)
    with pytest.raises(SettingsError, match="it is another model's"):
        Binarise().apply(tiny(0), {"method": "react", "layers": {}, "rules": {"conv2": "bwn"}})
    with pytest.raises(SettingsError, match="it is another model's"):
        Binarise().apply(Binarise().apply(tiny(0), plan), {**plan, "layers": {"bn1": "real"}})
    with torch.no_grad():
        model.conv2.weight[0] = float("nan")
    with pytest.raises(ModelError, match="hold NaN or infinity"):
        Binarise().run(model, task)


def test_edges_too_where_asked_for() -> None:
    plan = Binarise(method="bwn", edges="same").plan(tiny(0), task_for(tiny(0)))
    assert {"conv1", "linear"} <= set(plan["layers"])
    assert isinstance(
        Binarise(edges="same")
        .apply(tiny(0), Binarise(edges="same").plan(tiny(0), task_for(tiny(0))))
        .get_submodule("conv1"),
        BinaryConv2d,
    )
