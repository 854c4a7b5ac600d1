"""Activation pruning: where thresholds stand, what share they reach, what survives before and after."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import task_for, tiny
from residual_net import residual_net, residual_task
from tersenet.bricks.quantizer import Quantizer
from tersenet.bricks.threshold import Threshold
from tersenet.errors import DataError, ModelError, NoEffect, SettingsError
from tersenet.graph.trace import trace
from tersenet.pruning.prune_activations import PruneActivations
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.quantization.quantize import Quantize
from tersenet.quantization.quantize_aware import QuantizeAware
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.task import Task


def thresholds(model: nn.Module) -> dict[str, Threshold]:
    return {path: brick for path, brick in model.named_modules() if isinstance(brick, Threshold)}


def shares(model: nn.Module, task: Task) -> dict[str, float]:
    """path -> share of zeros behind each threshold, on the calibration data."""
    seen: dict[str, list[float]] = {}

    def hook(path: str) -> Any:
        return lambda brick, _, output: seen.setdefault(path, []).append(float((output == 0).double().mean()))

    handles = [brick.register_forward_hook(hook(path)) for path, brick in thresholds(model).items()]
    with torch.no_grad():
        for images in task.calibrate:
            model(images)
    for handle in handles:
        handle.remove()
    return {path: sum(values) / len(values) for path, values in seen.items()}


class Mixed(nn.Module):
    """A gate, a concatenation, a pool, a tanh-like activation and a pooled head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([torch.relu(self.a(x)), nn.functional.gelu(self.b(x))], 1)
        x = nn.functional.max_pool2d(x, 2)
        x = x * torch.sigmoid(self.gate(x))
        x = torch.relu(self.c(x))
        return self.head(x.mean(dim=(2, 3)))


def mixed() -> tuple[nn.Module, Task]:
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        model, data = Mixed().eval(), [torch.randn(16, 3, 8, 8) for _ in range(2)]
    return model, Task(example=data[0][:2], calibrate=data, quiet=True)


def test_sites_are_what_a_layer_reads_and_a_zero_survives() -> None:
    model, task = mixed()
    sites = PruneActivations().plan(model, task)["sites"]
    assert {name: (site["signed"], site["readers"]) for name, site in sites.items()} == {
        "relu_default": (False, ["gate", "c"]),
        "gelu_default": (True, ["gate", "c"]),
    }
    assert list(PruneActivations(places="relu").plan(model, task)["sites"]) == ["relu_default"]
    everything = PruneActivations(places="inputs").plan(model, task)["sites"]
    assert everything["mean_dim"]["readers"] == ["head"]


def test_channels_are_counted_where_they_are_the_second_dimension() -> None:
    model, task = mixed()
    sites = PruneActivations(per_channel=True, places="inputs").plan(model, task)["sites"]
    assert sites["relu_default"]["channels"] == 4
    tokens = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 2))
    task = Task(example=torch.randn(2, 5, 6), quiet=True)
    assert next(iter(PruneActivations(per_channel=True).plan(tokens, task)["sites"].values()))["channels"] is None


def test_what_a_skipped_layer_reads_is_left_alone() -> None:
    model, task = mixed()
    assert PruneActivations(skip=("gate",)).plan(model, task) == {}
    with pytest.warns(NoEffect, match="prune_activations matched no layer"):
        PruneActivations(skip=("gate",)).run(copy.deepcopy(model), task)


@pytest.mark.parametrize("per_channel", [False, True])
def test_every_site_reaches_its_share(per_channel: bool) -> None:
    model = residual_net()
    task = residual_task(model)
    step = PruneActivations(sparsity=0.8, share="layer", per_channel=per_channel, refit=False)
    pruned, _ = step.run(model, task)
    found = shares(pruned, task)
    assert len(found) == 7
    # The thresholds of earlier layers move what later ones see, so the share is met nearly; and channels that have
    # more zeros by themselves keep them, so the mean over channels can lie above it.
    assert all(0.76 < share < (0.87 if per_channel else 0.84) for share in found.values())


@pytest.mark.parametrize("share", ["error", "sensitivity"])
def test_all_sites_together_reach_the_share_and_lose_less(share: str) -> None:
    model = residual_net()
    task = residual_task(model)
    images = torch.cat(list(task.calibrate))
    wanted = model(images).detach()

    def error(step: PruneActivations) -> float:
        pruned, _ = step.run(copy.deepcopy(model), task)
        with torch.no_grad():
            return float((pruned(images) - wanted).square().mean())

    plain = error(PruneActivations(sparsity=0.7, share="layer", refit=False))
    assert error(PruneActivations(sparsity=0.7, share=share, refit=False)) < plain
    assert error(PruneActivations(sparsity=0.7, share=share, refit=True)) < 0.7 * plain


def test_a_bound_on_the_divergence_is_kept_and_used() -> None:
    model = residual_net()
    task = residual_task(model)
    from tersenet.numerics.divergence import divergence

    images = torch.cat(list(task.calibrate))
    found = []
    for bound in (1e-4, 1e-3):
        step = PruneActivations(sparsity=0.9, share="error", max_divergence=bound, refit=False)
        pruned, _ = step.run(copy.deepcopy(model), task)
        found.append(divergence(model(images), pruned(images)))
        assert 0.3 * bound < found[-1] <= bound * 1.001
    assert found[0] < found[1]


def test_thresholds_are_cut_with_their_channels_and_norms_fold() -> None:
    model = residual_net()
    task = residual_task(model)
    pruned, _ = PruneActivations(sparsity=0.6, per_channel=True).run(model, task)
    folded, _ = FoldBatchNorm().run(copy.deepcopy(pruned), task)
    with torch.no_grad():
        assert torch.allclose(folded(task.example), pruned(task.example), atol=1e-4)
    narrow, plan = PruneChannels(sparsity=0.5, refit=False).run(pruned, task)
    sizes = {path: brick.threshold.numel() for path, brick in thresholds(narrow).items()}
    assert 0 < min(sizes.values()) < max(sizes.values())
    assert any("thresholds" in path for path in plan["kept"])
    assert narrow(task.example).shape == (2, 6)


def test_before_and_after_quantization() -> None:
    model = residual_net()
    task = residual_task(model)
    before, _ = Quantize().run(PruneActivations(sparsity=0.6).run(copy.deepcopy(model), task)[0], task)
    after, _ = PruneActivations(sparsity=0.6).run(Quantize().run(copy.deepcopy(model), task)[0], task)
    for found in (before, after):
        graph = trace(found, task.example)
        layers = [n for n in graph.graph.nodes if n.op == "call_module" and "Quantized" in type(_at(graph, n)).__name__]
        assert layers
        assert all(isinstance(_at(graph, node.args[0]), Quantizer) for node in layers)
        assert len(thresholds(found)) == 7
    for path, brick in thresholds(after).items():  # between two steps of the grid in front
        node = next(n for n in after.graph.nodes if n.target == path)
        steps = float(brick.threshold / _at(after, node.args[0]).scale)
        assert steps % 1 == pytest.approx(0.5, abs=1e-3)


def _at(graph: nn.Module, node: object) -> nn.Module:
    return graph.get_submodule(str(node.target))  # type: ignore[attr-defined]


def test_behind_quantizers_that_train_the_model_can_be_copied() -> None:
    model = tiny(0)
    task = task_for(model)
    model, _ = QuantizeAware(weights="int4", activations="int4").run(model, task)
    model, plan = PruneActivations(sparsity=0.5).run(model, task)
    assert plan
    assert not any(value.requires_grad for value in model.buffers())
    twin = copy.deepcopy(model)
    assert torch.equal(twin.eval()(task.example), model.eval()(task.example))


def test_again_replaces_the_thresholds() -> None:
    model = residual_net()
    task = residual_task(model)
    once, _ = PruneActivations(sparsity=0.6).run(model, task)
    names = set(thresholds(once))
    twice, _ = PruneActivations(sparsity=0.7, per_channel=True).run(once, task)
    assert set(thresholds(twice)) == names
    assert max(brick.threshold.numel() for brick in thresholds(twice).values()) == 32


def test_zero_leaves_outputs_equal() -> None:
    model = residual_net()
    task = residual_task(model)
    wanted = model(task.example).detach()
    pruned, plan = PruneActivations(sparsity=0.0).run(model, task)
    assert len(plan["sites"]) == 7
    assert torch.equal(pruned(task.example), wanted)


def test_wrong_use_is_said() -> None:
    for settings, said in (
        ({"sparsity": 1.0}, "sparsity must lie in"),
        ({"share": "fair"}, "share must be one of layer, error, sensitivity"),
        ({"places": "all"}, "places must be one of"),
        ({"max_divergence": 0.0}, "max_divergence must be above 0"),
        ({"samples": 0}, "samples must be at least 1"),
    ):
        with pytest.raises(SettingsError, match=said):
            PruneActivations(**settings)
    model = residual_net()
    task = residual_task(model)
    with pytest.raises(DataError, match="no calibration data"):
        PruneActivations().run(copy.deepcopy(model), Task(example=task.example, quiet=True))
    with pytest.raises(DataError, match="calibration batch 0 holds NaN or infinite values"):
        PruneActivations().run(copy.deepcopy(model), Task(example=task.example, calibrate=[task.example / 0]))
    model.bn.weight.data[0] = float("nan")
    with pytest.raises(ModelError, match=r"activations in front of thresholds.* are not finite"):
        PruneActivations().run(copy.deepcopy(model), task)
    plan = PruneActivations().plan(*mixed())
    with pytest.raises(SettingsError, match="this model has no 'gelu_default'"):
        PruneActivations().apply(residual_net(), plan)
