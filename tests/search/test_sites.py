"""Where a search can pick, which layers that touches, and what counts as the same kind of place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from made_up import block, width
from residual_net import residual_net, residual_task
from tersenet.pruning.drop_blocks import DropBlocks
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.quantization.quantize import Quantize
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.search.sites import complete, configured, describe, find_sites, fingerprint, touched
from tersenet.step import Step

STEPS: tuple[Step, ...] = (FoldBatchNorm(), DropBlocks(), PruneChannels(), Quantize())


def test_sites_of_a_net() -> None:
    model = residual_net()
    before = copy.deepcopy(model.state_dict())
    sites = {site.key: site for site in find_sites(STEPS, model, residual_task(model))}
    assert list(sites) == [
        (1, "first"), (1, "last"), (2, "first.conv1"), (2, "down.conv1"), (2, "last.conv1"), (2, "last.conv2"),
        (3, "conv"),
    ]  # fmt: skip
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert sites[1, "first"].settings == ("keep", "drop")
    assert sites[2, "last.conv1"].settings == (16, 12, 8, 4)
    assert sites[1, "last"].layers == ("last.conv1", "last.conv2", "last.conv3")
    assert sites[1, "last"].holds(sites[2, "last.conv1"])
    assert not sites[1, "last"].holds(sites[2, "first.conv1"])
    assert not sites[1, "last"].holds(sites[1, "last"])
    assert sites[2, "first.conv1"].said == "Conv2d 16>16 3x3/1 @8x8 + Conv2d 16>16 3x3/1 @8x8"


def test_layers_of_a_width_are_those_that_change_size() -> None:
    """Held against really cutting there."""
    model = residual_net()
    task = residual_task(model)
    sizes = {key: value.shape for key, value in model.state_dict().items() if value.dim() > 1}
    for site in find_sites((PruneChannels(),), model, task):
        step = PruneChannels(refit=False).chosen({site.place: site.settings[-1]})
        assert step is not None
        made, _ = step.run(residual_net(), task)
        now = made.state_dict()
        assert {f"{path}.weight" for path in site.layers} == {key for key in sizes if now[key].shape != sizes[key]}


class Twice(nn.Module):
    """(N, 3, 8, 8) -> (N, 6): four blocks, of which two are alike, one is elsewhere and one has a stride."""

    def __init__(self) -> None:
        super().__init__()
        from residual_net import Plain

        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.one, self.two = Plain(16, 16), Plain(16, 16)
        self.down = Plain(16, 16, stride=2)
        self.three = Plain(16, 16)
        self.linear = nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.three(self.down(self.two(self.one(torch.relu(self.conv(x))))))
        return self.linear(x.mean(dim=(2, 3)))


def test_kinds() -> None:
    """Alike are layers of one type, size and shape, of one step, with the same steps around; weights do not count."""
    model = Twice().eval()
    task = residual_task(model)
    kinds = {site.key: site.kind for site in find_sites((DropBlocks(), PruneChannels()), model, task)}
    assert kinds[0, "one"] == kinds[0, "two"] != kinds[0, "three"]
    assert kinds[1, "one.conv1"] == kinds[1, "two.conv1"]
    assert len(set(kinds.values())) == len(kinds) - 2
    again = {site.key: site.kind for site in find_sites((DropBlocks(), PruneChannels()), Twice().eval(), task)}
    assert again == kinds
    rounded = {site.key: site.kind for site in find_sites((DropBlocks(), PruneChannels(), Quantize()), model, task)}
    assert not set(rounded.values()) & set(kinds.values())
    # With another grain the third setting is another width, and so is the one in the middle.
    coarse = {site.key: site.kind for site in find_sites((DropBlocks(), PruneChannels(multiple_of=8)), model, task)}
    assert [key for key in kinds if coarse[key] == kinds[key]] == [(0, "one"), (0, "two"), (0, "three")]


def test_words_for_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, (3, 1), stride=2), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=4), nn.Flatten(), nn.Linear(96, 6)
    ).eval()
    assert describe(model, torch.zeros(2, 3, 8, 8)) == {
        "0": "Conv2d 3>8 3x1/2 @8x8", "2": "Conv2d 8>8 1x1/1 g4 @3x4", "4": "Linear 96>6"
    }  # fmt: skip


def test_touched() -> None:
    known = {"a.one": "", "a.two": "", "ab": "", "b": ""}
    assert touched({"dropped": ["a"], "activations": {"a": None}}, known) == ("a.one", "a.two")
    assert touched({"kept": {"b": {"out": [0]}, "bn": {"channel": [0]}}}, known) == ("b",)
    assert touched({}, known) == ()


def test_fingerprints() -> None:
    known = {"a": "Conv2d 3>8", "b": "Linear 8>2"}
    few, more = [block("first")], [block("first"), width("x", 8, 4)]
    assert fingerprint(known, few, "") == fingerprint(dict(reversed(known.items())), few, "")
    others = [(known, few, ""), (known, few, "int8"), ({**known, "b": "Linear 8>3"}, few, ""), (known, more, "")]
    assert len({fingerprint(*each) for each in others}) == 4


def test_configured() -> None:
    """Steps with picks get them, steps without choices stay, steps with nothing to do are left out."""
    picks: dict[int, dict[str, Any]] = {1: {"first": "drop"}, 2: {"down.conv1": 16}}
    assert configured(STEPS, picks) == [
        FoldBatchNorm(), DropBlocks(blocks=("first",)), PruneChannels(widths={"down.conv1": 16}), Quantize()
    ]  # fmt: skip
    assert configured(STEPS, {1: {}, 2: {}}) == [FoldBatchNorm(), Quantize()]
    sites = [width("x", 8, 4, step=2), block("first")]
    assert complete({1: {"first": "drop"}}, sites) == {1: {"first": "drop"}, 2: {}}


def test_a_place_with_one_setting_is_none() -> None:
    class Lone(PruneChannels):
        def choices(self, model: nn.Module, task: object) -> dict[str, list[int]]:
            return {"down.conv1": [32]}

    model = residual_net()
    assert find_sites((Lone(),), model, residual_task(model)) == []


@pytest.mark.parametrize("step", [FoldBatchNorm(), Quantize(activations=None)])
def test_a_step_without_choices_has_no_sites(step: Step) -> None:
    model = residual_net()
    assert find_sites((step,), model, residual_task(model)) == []
