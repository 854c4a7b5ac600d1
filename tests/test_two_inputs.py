"""Models of two inputs: every step serves them, or says in one sentence that it does not; cut, trained and shipped."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cases import CASES
from tersenet.deploy.artifact import load_terse, save_terse
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.pt2 import export_pt2, read_pt2
from tersenet.deploy.runtimes import open_file
from tersenet.errors import DataError, SettingsError
from tersenet.job import compress
from tersenet.pruning.channel_scores import SCORES
from tersenet.pruning.drop_blocks import DropBlocks
from tersenet.pruning.importance import gate_gradients
from tersenet.pruning.known import known_coupling
from tersenet.pruning.prune_activations import PruneActivations
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.pruning.prune_weights import PruneWeights
from tersenet.quantization.quantize import Quantize
from tersenet.recipe import Recipe
from tersenet.size.shrink_file import ShrinkFile
from tersenet.step import Step
from tersenet.task import Task, score_model
from tersenet.train import Train
from tersenet.train.batches import split


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


class TwoInputs(nn.Module):
    """An image and five numbers about it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.block = Block()
        self.conv = nn.Conv2d(16, 16, 3, stride=2)
        self.first, self.second = nn.Linear(5, 16), nn.Linear(16, 16)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        y = torch.relu(self.conv(self.block(torch.relu(self.norm(self.stem(x))))))
        z = torch.relu(self.second(torch.relu(self.first(z))))
        return self.head(torch.cat([y.mean((2, 3)), z], dim=1))


def net() -> nn.Module:
    torch.manual_seed(3)
    return TwoInputs().eval()


def batch(samples: int, seed: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The class is whether the image is bright, and whether the numbers are large: neither input alone tells it."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, 8, 8, generator=made) + torch.randn(samples, 1, 1, 1, generator=made)
    z = torch.randn(samples, 5, generator=made)
    return (x, z), (z.sum(dim=1) > 0).long() + 2 * (x.mean(dim=(1, 2, 3)) > 0).long()


def task(**settings: object) -> Task:
    train = [batch(32, seed) for seed in range(8)]
    return dataclasses.replace(
        Task(example=batch(2, 90)[0], train=train, calibrate=train[:4], test=[batch(64, 91)], quiet=True),  # type: ignore[arg-type]
        **settings,
    )


def outputs(model: nn.Module, samples: int = 5) -> Tensor:
    with torch.no_grad():
        return model.eval()(*batch(samples, 92)[0])


def run(step: Step, model: nn.Module, on: Task) -> tuple[nn.Module, dict]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return step.run(copy.deepcopy(model), on)


# What serves one input: a search times files of one, a size is that of an image.
ONE = ("search", "resize")
# A setting of a step more or less asks the same of the inputs.
QUICK = (
    "prune_channels", "prune_activations", "prune_weights", "prune_while_training", "drop_blocks", "quantize_aware",
    "binarise", "ternarise", "train", "repeat", "rewind", "share_weights", "shrink_file", "keep_grids", *ONE,
)  # fmt: skip


def some(names: Iterable[str], quick: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some(CASES, QUICK))
def test_every_step_serves_two_inputs_or_says_that_it_does_not(name: str) -> None:
    model, on, step = net(), task(), CASES[name].step
    on.original = copy.deepcopy(model)
    if name in ONE:
        with pytest.raises(SettingsError, match=f"^the model takes 2 inputs, and {name} serves models of one"):
            step.check(on)
        with pytest.raises(SettingsError, match=f"^(search: |resize: )?the model takes 2 inputs, and {name} serves"):
            step.run(model, on)
        return
    made, plan = run(step, model, on)
    assert json.loads(json.dumps(plan)) == plan
    assert outputs(made).shape == (5, 4)
    with torch.random.fork_rng():
        replayed = step.apply(net(), json.loads(json.dumps(plan)))
    replayed.load_state_dict(made.state_dict())
    assert torch.equal(outputs(replayed), outputs(made))


def zeroed(model: nn.Module, kept: dict[str, dict[str, list[int]]]) -> nn.Module:
    """The model with zeros where a cut takes channels away: what each layer reads, so the rest is as in the cut one."""
    twin = copy.deepcopy(model)
    for path, roles in kept.items():
        if "in" in roles:
            weight = twin.get_submodule(path).weight
            gone = torch.ones(weight.shape[1], dtype=torch.bool)
            gone[roles["in"]] = False
            with torch.no_grad():
                weight[:, gone] = 0.0
    return twin


@pytest.mark.parametrize("importance", some(SCORES, ("l2", "activation", "taylor", "obd", "thinet", "reconstruction")))
def test_a_cut_is_the_model_with_zeros(importance: str) -> None:
    made, plan = run(PruneChannels(sparsity=0.5, importance=importance, refit=False), net(), task())
    assert {"conv", "first", "second"} <= plan["keep"].keys()
    assert plan["input"] == ["2x3x8x8", "2x5"]
    torch.testing.assert_close(outputs(made), outputs(zeroed(net(), plan["kept"])))


def test_an_edited_plan_of_two_inputs_is_applied() -> None:
    _, plan = run(PruneChannels(sparsity=0.5, refit=False), net(), task())
    plan["keep"]["first"] = [1, 2, 3]
    made = PruneChannels().apply(net(), plan)
    assert made.get_submodule("second").in_features == 3
    torch.testing.assert_close(outputs(made), outputs(zeroed(net(), {**plan["kept"], "second": {"in": [1, 2, 3]}})))


@pytest.mark.parametrize(
    "step",
    [
        PruneChannels(sparsity=0.5), PruneChannels(residual=True, macs=0.6, scope="sensitivity"), DropBlocks(count=1),
        PruneWeights(sparsity=0.7, refit=True), PruneActivations(sparsity=0.7, share="sensitivity"),
    ],
    ids=["channels", "budget", "blocks", "weights", "activations"],
)  # fmt: skip
def test_repair_looks_at_both_inputs(step: Step) -> None:
    """Outputs come nearer to the model's than without repair."""
    on, model = task(), trained()
    wanted = outputs(model, 64)

    def away(step: Step) -> float:
        return float((outputs(run(step, model, on)[0], 64) - wanted).square().mean())

    assert away(step) < 0.8 * away(dataclasses.replace(step, refit=False))  # type: ignore[call-arg]


def test_importances_of_weights_look_at_both_inputs() -> None:
    on, model = task(), trained()
    wanted = outputs(model, 64)
    away = {
        name: float(
            (outputs(run(PruneWeights(sparsity=0.6, importance=name), model, on)[0], 64) - wanted).square().mean()
        )
        for name in ("obs", "fisher", "random")
    }
    assert max(away["obs"], away["fisher"]) < 0.5 * away["random"]


@functools.cache
def trained() -> nn.Module:
    return run(Train(epochs=6, optimizer="adam", learning_rate=0.01), net(), task())[0]


def near(model: nn.Module, folder: Path) -> None:
    """Every file gives what the model gives."""
    example, (inputs, _) = batch(2, 90)[0], batch(16, 93)
    with torch.no_grad():
        wanted = model.eval()(*inputs)
    torch.testing.assert_close(load_terse(save_terse(model, example, folder / "model.terse"))(*inputs), wanted)
    torch.testing.assert_close(read_pt2(export_pt2(model, example, folder / "model.pt2"))[0](*inputs), wanted)
    found = open_file(export_onnx(model, example, folder / "model.onnx")).run(tuple(x.numpy() for x in inputs))
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-4)


def test_cut_tuned_and_written(tmp_path: Path) -> None:
    """Half of the channels gone, trained again, and in every file the same."""
    on, model = task(), trained()
    cut, _ = run(PruneChannels(sparsity=0.5, refit=False), model, on)
    tuned, _ = run(Train(epochs=2, optimizer="adam", learning_rate=0.01), cut, on)
    scores = [score_model(each, on, on.test or ()).value for each in (model, cut, tuned)]
    assert scores[0] > 0.8, "one input alone gives half of that"
    assert scores[2] > max(scores[1], 0.8)
    near(tuned, tmp_path)


@pytest.mark.minutes
def test_cut_trained_and_shipped(tmp_path: Path) -> None:
    recipe = Recipe(
        (
            PruneChannels(sparsity=0.5), Train(epochs=2, optimizer="adam", learning_rate=0.003),
            ShrinkFile(max_drop=1.0), Quantize(formats={"stem": "int8"}),
        )
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = compress(trained(), task(), recipe, out=tmp_path / "run", runtimes=("onnxruntime",))
    assert not made.report.get("not_written")
    (inputs, _) = batch(16, 93)
    with torch.no_grad():
        wanted = made.model(*inputs)
        torch.testing.assert_close(load_terse(made.file("model.terse"))(*inputs), wanted)
        torch.testing.assert_close(read_pt2(made.file("model.pt2"))[0](*inputs), wanted)
    found = open_file(made.file("model.onnx")).run(tuple(x.numpy() for x in inputs))
    assert np.abs(found - wanted.numpy()).max() < 0.02 * np.abs(wanted.numpy()).max()
    before, after = made.rows[0]["score"], made.rows[-1]["score"]
    assert before > 0.8, "both inputs are needed for it"
    assert after > 0.7
    assert made.rows[-1]["params"] < 0.8 * made.rows[0]["params"]


def test_what_cannot_serve_is_said_before_anything_is_made(tmp_path: Path) -> None:
    recipe = Recipe.parse("steps: [quantize: {}, repeat: {steps: [resize: {sizes: [8x8]}], until_drop: null}]")
    with pytest.raises(SettingsError, match="takes 2 inputs, and resize serves models of one"):
        compress(net(), task(), recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_samples_are_counted_and_not_inputs() -> None:
    model, on = net(), task()
    known = known_coupling(model, on.example)
    gradients = gate_gradients(model, on, known, limit=64)
    assert len(gradients) == 64
    assert (gradients != 0).any(axis=1).all()


def test_images_of_another_size_or_number_are_refused() -> None:
    wrong = task(calibrate=[(batch(8, 1)[0][:1], None)], train=None)
    with pytest.raises(DataError, match="calibration batch 0 has 1 inputs, the model 2"):
        PruneChannels(sparsity=0.5).run(net(), wrong)
    x, z = batch(8, 1)[0]
    with pytest.raises(DataError, match=r"calibration batch 0 is \[8, 6\]"):
        PruneWeights(sparsity=0.5, refit=True).run(net(), task(calibrate=[((x, torch.cat([z, z[:, :1]], 1)), None)]))


def test_a_batch_of_two_samples_and_two_inputs_is_split_by_samples() -> None:
    x, z = torch.arange(6.0).view(2, 3), torch.arange(2.0).view(2, 1)
    for given in ([[x, z], torch.tensor([0, 1])], {"input": [x, z], "label": torch.tensor([0, 1])}):
        part, weight = split(given, 2, 1, 2)
        inputs, label = part.values() if isinstance(part, dict) else part
        assert [each.tolist() for each in inputs] == [[[3.0, 4.0, 5.0]], [[1.0]]]
        assert (label.tolist(), weight) == ([1], 1.0)
