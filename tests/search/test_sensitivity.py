"""What each pick hurts: against trying each by hand, monotone, and kept on disk."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from made_up import block, width
from residual_net import residual_net, residual_task
from tersenet.numerics.divergence import divergence
from tersenet.pruning.drop_blocks import DropBlocks
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.search.sensitivity import find_losses, outputs_of
from tersenet.search.sites import find_sites
from tersenet.step import Step
from tersenet.task import Task

IMAGES = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True, kw_only=True)
class Blind(DropBlocks):
    """Does not say its sensitivities, so that each choice must be tried."""

    def sensitivities(self, model: nn.Module, task: Task, images: Tensor) -> dict[str, dict[Any, float]]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Told(PruneChannels):
    """Says them itself, not in order."""

    def sensitivities(self, model: nn.Module, task: Task, images: Tensor) -> dict[str, dict[Any, float]]:
        return {"last.conv1": {16: 0.0, 12: 0.3, 8: 0.2, 4: 0.7}, "last.conv2": {16: 0.0, 12: -0.1, 8: 0.0, 4: 0.1}}

    def choices(self, model: nn.Module, task: Task) -> dict[str, list[Any]]:
        return {name: found for name, found in super().choices(model, task).items() if name.startswith("last")}


def losses_of(steps: tuple[Step, ...], folder: Path | None, said: list[str] | None = None, seed: int = 0) -> Any:
    model = residual_net(seed)
    task = residual_task(model)
    sites = find_sites(steps, model, task)
    return find_losses(steps, sites, model, task, IMAGES, folder, ([] if said is None else said).append)


def test_outputs_leave_the_modes_as_they_are() -> None:
    model = residual_net()
    whole = model(IMAGES).detach()
    model.train()
    norm = model.get_submodule("bn").eval()
    before = copy.deepcopy(model.state_dict())
    (found,) = outputs_of(model, IMAGES.repeat(3, 1, 1, 1))
    torch.testing.assert_close(found, whole.repeat(3, 1))
    assert (model.training, norm.training, model.get_submodule("first").training) == (True, False, True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_each_choice_is_tried_where_a_step_does_not_say() -> None:
    found = losses_of((Blind(refit=False),), None)
    model = residual_net()
    for place in ("first", "last"):
        made, _ = DropBlocks(blocks=(place,), refit=False).run(residual_net(), residual_task(model))
        with torch.no_grad():
            wanted = divergence(model(IMAGES), made(IMAGES))
        assert found[0, place] == [0.0, pytest.approx(wanted, rel=1e-4)]
        assert wanted > 0


def test_what_a_step_says_is_taken_and_made_monotone() -> None:
    found = losses_of((Told(),), None)
    assert found == {(0, "last.conv1"): [0.0, 0.3, 0.3, 0.7], (0, "last.conv2"): [0.0, 0.0, 0.0, 0.1]}


def test_the_real_steps() -> None:
    found = losses_of((DropBlocks(), PruneChannels()), None)
    assert len(found) == 6
    for row in found.values():
        assert row[0] == 0
        assert row == sorted(row)
        assert row[-1] > 0


def test_without_images_only_the_share_counts() -> None:
    sites = [width("a", 16, 12, 8, 4), block("b")]
    model = residual_net()
    found = find_losses((), sites, model, residual_task(model), None, None, print)
    assert found == {(0, "a"): [0.0, 0.0625, 0.25, 0.5625], (1, "b"): [0.0, 1.0]}


def test_kept_on_disk(tmp_path: Path) -> None:
    said: list[str] = []
    first = losses_of((DropBlocks(), PruneChannels()), tmp_path / "kept", said)
    assert len(said) == 2
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".json"]
    said.clear()
    assert losses_of((DropBlocks(), PruneChannels()), tmp_path / "kept", said) == first
    assert said == []  # nothing was found anew
    # Other weights, settings, images or steps are kept apart.
    losses_of((DropBlocks(), PruneChannels()), tmp_path / "kept", said, seed=1)
    losses_of((DropBlocks(), PruneChannels(importance="l1")), tmp_path / "kept", said)
    losses_of((DropBlocks(),), tmp_path / "kept", said)
    model = residual_net()
    task = residual_task(model)
    sites = find_sites((DropBlocks(),), model, task)
    find_losses((DropBlocks(),), sites, model, task, IMAGES[:32], tmp_path / "kept", said.append)
    assert len(said) == 2 + 2 + 1 + 1
    assert len(list((tmp_path / "kept").iterdir())) == 5


ROW = [0.0, 0.1]
DAMAGED = {
    "cut short": b'{"0:first": [0.0',
    "no text": b"\xff\xfe",
    "empty": b"",
    "a list": b"[]",
    "a number": b"1",
    "nested far too deep": b"[" * 200_000,
    "a place is missing": json.dumps({"0:first": ROW}).encode(),
    "a row is short": json.dumps({"0:first": ROW, "0:last": [0.0]}).encode(),
    "a row is none": json.dumps({"0:first": ROW, "0:last": None}).encode(),
    "words": json.dumps({"0:first": ROW, "0:last": [0.0, "x"]}).encode(),
    "not finite": json.dumps({"0:first": ROW, "0:last": [0.0, float("nan")]}).encode(),
    "less than nothing": json.dumps({"0:first": ROW, "0:last": [0.0, -1.0]}).encode(),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_cache_is_rebuilt_and_said(tmp_path: Path, kind: str) -> None:
    steps = (Blind(refit=False),)
    first = losses_of(steps, tmp_path)
    path = next(tmp_path.iterdir())
    path.write_bytes(DAMAGED[kind])
    said: list[str] = []
    assert losses_of(steps, tmp_path, said) == first
    assert said[0] == f"the kept sensitivities {path} are damaged; they are found anew"
    said.clear()
    assert losses_of(steps, tmp_path, said) == first
    assert said == []
