"""What steps leave alone is said: which layers, why, and what share of the weights, up to the report."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from cases import CASES, task_for, tiny
from residual_net import residual_net, residual_task
from tersenet.left_alone import LEFT_OUT, LeftAlone, Reason, gathered, lines, listening, some, trying, weights_of
from tersenet.pruning.drop_blocks import DropBlocks
from tersenet.pruning.prune_activations import PruneActivations
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.pruning.prune_weights import PruneWeights
from tersenet.quantization.quantize import Quantize
from tersenet.repeat import Repeat
from tersenet.report.card import write_card
from tersenet.report.page import write_html
from tersenet.report.terminal import notes
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.size.shrink_file import ShrinkFile
from tersenet.step import Chain, Step
from tersenet.task import Task
from tersenet.train import Train

CHOOSING = [name for name, case in CASES.items() if case.step.chooses_layers and case.step.family != "search"]
QUIET = ("rewind",)  # goes back to what was, layer by layer, and has nothing that it could not touch


def left_by(step: Step, model: nn.Module, task: Task) -> LeftAlone | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return step.left_alone(model, step.plan(model, task), task)


def reasons_of(left: LeftAlone | None) -> dict[str, tuple[str, ...]]:
    return {} if left is None else {reason.why: reason.layers for reason in left.reasons}


@pytest.mark.parametrize("name", [name for name in CHOOSING if name not in QUIET])
def test_every_step_says_what_it_left_alone(name: str) -> None:
    """Told to skip everything, a step says that all of it was left alone, and most of it for that."""
    case = CASES[name]
    model = case.model(0)
    step = dataclasses.replace(case.step, skip=("*",))
    left = left_by(step, model, task_for(model))
    assert left is not None
    here = {path for path, _ in model.named_modules()} | {path for path, _ in model.named_parameters()}
    assert {path for reason in left.reasons for path in reason.layers} <= here
    assert any(reason.why == LEFT_OUT for reason in left.reasons)
    assert left.share == pytest.approx(sum(reason.share for reason in left.reasons))
    assert left.share > 0.5


def test_channels_that_stand_still_are_those_that_are_said() -> None:
    model = residual_net()
    task = residual_task(model)
    step = PruneChannels(sparsity=0.5, refit=False)
    left = left_by(step, model, task)
    assert reasons_of(left) == {
        "pass through a residual addition": (
            "conv", "first.conv2", "down.conv2", "down.shortcut", "last.conv3"
        ),
        "its channels are the model's output": ("linear",),
    }  # fmt: skip
    cut, _ = step.run(copy.deepcopy(model), task)
    sizes = weights_of(model)
    whole = [
        path
        for path in sizes
        if len(cut.get_submodule(path).weight) == len(model.get_submodule(path).weight)  # type: ignore[arg-type]
    ]
    assert left is not None
    assert left.share == pytest.approx(sum(sizes[path] for path in whole) / sum(sizes.values()))
    more = left_by(dataclasses.replace(step, residual=True), model, task)
    assert more is not None
    assert left.advice == f"residual: true would allow {100 * (left.share - more.share):.1f} % more"
    assert more.advice == ""


@pytest.mark.parametrize(
    ("settings", "why", "layers"),
    [
        ({"skip": ("last.conv1",)}, LEFT_OUT, ("last.conv1",)),
        ({"widths": {"first.conv1": 8}}, "are not named in widths", ("down.conv1", "last.conv1", "last.conv2")),
        ({"keep": {"last.conv1": [0, 2]}}, "are not named in keep", ("first.conv1", "last.conv2")),
        ({"multiple_of": 32}, "have no smaller width that is a multiple of 32", ("first.conv1", "last.conv1")),
    ],
)
def test_why_channels_stay(settings: dict[str, Any], why: str, layers: tuple[str, ...]) -> None:
    model = residual_net()
    found = reasons_of(left_by(PruneChannels(refit=False, **settings), model, residual_task(model)))
    assert set(layers) <= set(found[why])


class Odd(nn.Module):
    """Norms of which only one can be folded, a table of positions, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 8, 1, 1), requires_grad=True)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 1)
        self.second = nn.BatchNorm2d(8)
        self.third = nn.BatchNorm2d(8)
        self.transposed = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.unused = nn.BatchNorm2d(4)
        self.conv.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)) + self.position)
        y = self.twice(x)
        return self.transposed(self.third(torch.relu(self.second(y) + y)))


def odd() -> tuple[nn.Module, Task]:
    return Odd().eval(), Task(example=torch.randn(2, 3, 8, 8), calibrate=[torch.randn(4, 3, 8, 8)], quiet=True)


def test_reasons_of_the_other_steps() -> None:
    model, task = odd()
    assert reasons_of(left_by(FoldBatchNorm(), model, task)) == {
        "stand behind a layer whose output is used elsewhere, too": ("second",),
        "have no layer right before them": ("third",),
        "are not called": ("unused",),
    }
    frozen = "are frozen (requires_grad is off) or whole numbers"
    outside = "are parameters outside of layers"
    assert reasons_of(left_by(PruneWeights(layers={"twice": "0.5"}), model, task)) == {
        "are not named in layers": ("transposed",), frozen: ("conv",), outside: ("position",)
    }  # fmt: skip
    assert reasons_of(left_by(Train(), model, task))[frozen] == ("conv",)
    assert reasons_of(left_by(Quantize(activations=None), model, task)) == {
        "stay float: there is no integer kernel for ConvTranspose2d": ("transposed",), outside: ("position",)
    }  # fmt: skip
    assert reasons_of(left_by(ShrinkFile(price=1e-9), model, task)) == {
        "are no 2-d convolutions or linear layers, but ConvTranspose2d": ("transposed",), outside: ("position",)
    }  # fmt: skip
    assert reasons_of(left_by(PruneActivations(), model, task))["do not read what an activation function makes"] == (
        "conv",
        "transposed",
    )


def test_constants_of_an_import_are_called_so() -> None:
    model, task = odd()
    model.add_module("scale", nn.Module())
    model.scale.register_parameter("constant", nn.Parameter(torch.ones(1, 4, 1, 1)))  # type: ignore[operator]
    for step in (Quantize(activations=None), ShrinkFile(price=1e-9), PruneWeights(sparsity=0.5)):
        assert reasons_of(left_by(step, model, task))["are parameters outside of layers"] == ("position", "scale")


def test_blocks_that_cannot_go_are_named() -> None:
    model = residual_net()
    found = reasons_of(left_by(DropBlocks(count=1, skip=("last",)), model, residual_task(model)))
    assert found[LEFT_OUT] == ("last",)
    assert found["are in no block"] == ("conv", "linear")
    assert next(layers for why, layers in found.items() if "changes the shape" in why) == ("down",)
    assert left_by(DropBlocks(), model, residual_task(model)) is None


def test_a_chain_says_each_step_and_a_repetition_its_last_round() -> None:
    model = residual_net()
    task = residual_task(model)
    cut = PruneChannels(sparsity=0.25, refit=False)
    with listening() as heard:
        Chain(steps=(cut, FoldBatchNorm(), Quantize(activations=None))).run(copy.deepcopy(model), task)
    assert [name for name, _ in heard] == ["prune_channels"]  # the others left nothing
    with listening() as heard:
        Repeat(steps=(cut,), until_drop=None, at_most=3).run(copy.deepcopy(model), task)
    assert [name for name, _ in heard] == ["prune_channels"]
    with listening() as heard, trying():
        cut.run(copy.deepcopy(model), task)
    assert heard == []


def test_without_a_listener_it_goes_to_the_log(caplog: Any) -> None:
    model = residual_net()
    with caplog.at_level(logging.INFO, logger="tersenet"):
        PruneChannels(sparsity=0.25, refit=False).run(model, residual_task(model))
    assert "prune_channels left alone: " in caplog.text
    assert "residual: true would allow" in caplog.text


def test_shared_weights_count_once_and_masks_are_no_layers_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 6), nn.LayerNorm(6))
    model[1].weight = model[0].weight
    assert weights_of(model) == {"0": 24}
    masked, _ = PruneWeights(sparsity=0.5).run(tiny(), task_for(tiny()))
    assert weights_of(masked) == weights_of(tiny())


def test_lines_fit_a_terminal() -> None:
    layers = [f"features.{i}.conv" for i in range(40)]
    left = gathered(dict.fromkeys(layers, 10), {path: f"why {i % 5} holds" for i, path in enumerate(layers)})
    assert left is not None
    found = lines(left)
    assert len(found) == 5
    assert found[0] == "left alone: 100 % of the weights"
    assert found[1].startswith("  20.0 % why 0 holds: features.0.conv, ")
    assert found[-1] == "  and 2 more reasons"
    assert all(len(line) <= 76 for line in found)
    assert some(("", "a"), 1) == "the model + 1 more"
    assert gathered({"a": 1}, {}) is None


def test_report_page_card_and_terminal_have_it(tmp_path: Path) -> None:
    report = json.loads((Path(__file__).parent / "report" / "example_report.json").read_text(encoding="utf-8"))
    left = LeftAlone("weights", 0.25, (Reason("pass <through>", ("a.b", "c"), 0.25),), "residual: true would")
    assert LeftAlone.of_json(json.loads(json.dumps(left.to_json("prune_channels")))) == left
    report["rows"][1]["step"] = "1. prune_channels"
    report["rows"][1]["left_alone"] = [left.to_json("prune_channels")]
    report["rows"][1]["notes"] = ["a note"]
    report["warnings"] = ["something else"]
    write_card(report, tmp_path / "README.md")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "- prune\\_channels left 25.0 % of the weights alone: 25.0 % pass &lt;through&gt; (a.b, c)." in card
    write_html([report], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "What was left alone" in page
    assert "pass &lt;through&gt;" in page
    assert "residual: true would" in page
    console = Console(width=80, file=io.StringIO())
    for line in notes(report):
        console.print(line, markup=False)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1. prune_channels: left alone: 25.0 % of the weights\n" in text
    assert "  residual: true would\n" in text
    assert "25.0 % pass <through>: a.b, c" in text
    assert "a note" in text
    assert "mind: something else" in text
