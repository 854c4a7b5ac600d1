"""Files on a budget: grids that the coder finds, layers that make up for each other, and a judge that sees no test."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from cases import batches, task_for, tiny
from tersenet.codec import container
from tersenet.errors import DataError, SettingsError
from tersenet.numerics.divergence import divergence
from tersenet.pruning.prune_weights import PruneWeights
from tersenet.quantization.quantize_aware import QuantizeAware
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.rewrite.settle import Settle
from tersenet.size import rounding
from tersenet.size.judge import Judge
from tersenet.size.sensitivity import output_sensitivities
from tersenet.size.shrink_file import ShrinkFile, coded_bytes
from tersenet.step import Chain
from tersenet.task import Task


def folded(seed: int = 0) -> tuple[nn.Module, Task]:
    model = tiny(seed)
    task = task_for(model)
    return FoldBatchNorm().run(model, task)[0], task


def outputs(model: nn.Module, task: Task) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in task.test])  # type: ignore[union-attr]


def test_every_layer_is_on_grids_that_the_coder_finds(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, task = folded()
    ShrinkFile(price=1e-8).run(model, task)
    container.write(tmp_path / "a", {}, {name: value + 0.0 for name, value in model.state_dict().items()})
    codecs = {row["name"]: row["codec"] for row in container.inspect(tmp_path / "a").rows()}
    assert {codec for name, codec in codecs.items() if name.endswith("weight")} == {"grid"}


def test_bytes_are_met_and_nearly_used() -> None:
    model, task = folded()
    whole = sum(p.numel() for p in tiny().parameters()) * 4
    ShrinkFile(bytes="0.15x").run(model, task)
    assert 0.12 * whole < coded_bytes(model) <= 0.15 * whole


def test_more_bytes_less_divergence() -> None:
    found = []
    for share in ("0.1x", "0.15x"):
        model, task = folded()
        before = outputs(model, task)
        ShrinkFile(bytes=share).run(model, task)
        found.append(divergence(before, outputs(model, task)))
    assert found[1] < 0.7 * found[0]


def test_it_beats_plain_grids_of_as_many_bytes() -> None:
    """Against the same step, relative to its largest weight, in every layer, rounded to nearest."""
    model, task = folded()
    before = outputs(model, task)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for layer in plain.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                step = layer.weight.abs().max() / 7
                layer.weight.copy_(torch.round(layer.weight / step) * step)
                step = layer.bias.abs().max() / 127  # type: ignore[union-attr]
                layer.bias.copy_(torch.round(layer.bias / step) * step)  # type: ignore[union-attr,arg-type]
    ShrinkFile(bytes=coded_bytes(plain)).run(model, task)
    assert coded_bytes(model) <= coded_bytes(plain)
    assert divergence(before, outputs(model, task)) < 0.6 * divergence(before, outputs(plain, task))


def test_layers_make_up_for_those_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fitted to the original's outputs it is nearer to them than when each layer is rounded as it stands."""
    model, task = folded()
    before = outputs(model, task)
    fitted = copy.deepcopy(model)
    ShrinkFile(price=1e-8).run(fitted, task)
    monkeypatch.setattr(rounding, "RIDGE", 1e6)
    ShrinkFile(price=1e-8).run(model, task)
    assert divergence(before, outputs(fitted, task)) < divergence(before, outputs(model, task))


def test_norms_that_are_kept_follow() -> None:
    model = tiny()
    task = task_for(model)
    before, was = outputs(model, task), copy.deepcopy(model)
    ShrinkFile(price=1e-8).run(model, task)
    moved = copy.deepcopy(model)
    for name, module in moved.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.load_state_dict(was.get_submodule(name).state_dict())
    assert divergence(before, outputs(model, task)) < divergence(before, outputs(moved, task))


def test_masks_stay() -> None:
    model, task = folded()
    PruneWeights(sparsity=0.5).run(model, task)
    gone = {name: module.weight == 0 for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    ShrinkFile(price=1e-8).run(model, task)
    for name, where in gone.items():
        assert bool((model.get_submodule(name).weight[where] == 0).all())  # type: ignore[index]


def test_layers_of_few_values_are_left_alone() -> None:
    """Their float weights are in no file; settled, the network has nothing to round at all."""
    model = tiny(0)
    task = task_for(model)
    model, _ = QuantizeAware(weights="int4", activations="int4").run(model, task)
    before = copy.deepcopy(model.state_dict())
    ShrinkFile(price=1e-4).run(model, task)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    settled, _ = Chain(steps=(FoldBatchNorm(), Settle())).run(model, task)
    before = copy.deepcopy(settled.state_dict())
    ShrinkFile(price=1e-4).run(settled, task)
    assert all(torch.equal(value, before[key]) for key, value in settled.state_dict().items())


def test_without_data_a_budget_of_bytes_is_met() -> None:
    model, task = folded()
    blind = dataclasses.replace(task, train=None, calibrate=None)
    ShrinkFile(bytes="0.15x").run(model, blind)
    assert coded_bytes(model) <= 0.15 * 4 * sum(p.numel() for p in tiny().parameters())
    with pytest.raises(DataError, match="judge a drop"):
        ShrinkFile(max_drop=1.0).run(model, blind)


def test_a_drop_is_judged_without_the_test_set() -> None:
    model, task = folded()

    class Never(list):  # type: ignore[type-arg]
        def __iter__(self) -> None:  # type: ignore[override]
            raise AssertionError("the test set was read")

    judge = Judge.of(model, task, 64)
    assert judge.drop(model) == 0.0
    ShrinkFile(max_drop=2.0, images=64).run(model, dataclasses.replace(task, test=Never()))
    assert judge.drop(model) <= 2.0


def test_a_held_out_set_judges_where_there_is_one() -> None:
    model, task = folded()
    held = dataclasses.replace(task, validate=batches(3, seed=9))
    judge = Judge.of(model, held, 64)
    assert judge.said == "score on the held-out set"
    ruined = copy.deepcopy(model)
    with torch.no_grad():
        ruined.linear.weight.zero_()
        ruined.linear.bias.copy_(torch.arange(6.0))
    hits = [[int((net(x).argmax(1) == y).sum()) for x, y in held.validate] for net in (model, ruined)]  # type: ignore[union-attr]
    assert judge.drop(ruined) == pytest.approx(100 * (sum(hits[0]) - sum(hits[1])) / 48)


def test_sensitivities_tell_what_errors_cost() -> None:
    """Against noise added to a layer's output, and the divergence that it makes."""
    model, task = folded()
    graph = rounding.trace(model, task.example)
    calls = rounding._calls(graph)
    images = torch.cat([x for x, _ in task.train])  # type: ignore[union-attr]
    found = output_sensitivities(graph, calls, images)
    with torch.no_grad():
        before = model(images)
        source = torch.Generator().manual_seed(0)
        for path in ("conv1", "conv2", "linear"):
            layer, size = model.get_submodule(path), 0.05

            def disturb(_: nn.Module, __: object, given: Tensor) -> Tensor:
                return given + size * torch.randn(given.shape, generator=source)  # noqa: B023

            hook = layer.register_forward_hook(disturb)
            real = sum(divergence(before, model(images)) for _ in range(20)) / 20
            hook.remove()
            assert 0.4 < float(found[path].sum()) * size**2 / 2 / real < 2.5


def test_what_is_refused() -> None:
    with pytest.raises(SettingsError, match="one of bytes, max_drop and price, got none"):
        ShrinkFile()
    with pytest.raises(SettingsError, match="got bytes and price"):
        ShrinkFile(bytes="0.1x", price=1e-6)
    for wrong in ("x", "0x", "-1", "much", True):
        with pytest.raises(SettingsError, match="bytes must be"):
            ShrinkFile(bytes=wrong)
    with pytest.raises(SettingsError, match="max_drop must be"):
        ShrinkFile(max_drop=-1)
    with pytest.raises(SettingsError, match="price must lie"):
        ShrinkFile(price=1.0)
    model, task = folded()
    with pytest.raises(SettingsError, match="no grid fits into 10 bytes"):
        Chain(steps=(ShrinkFile(bytes=10),)).run(model, task)
