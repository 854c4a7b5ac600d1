"""Repeat: stops at the right round, is judged by the right data, replays on a fresh model, goes on after a cut."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cases import task_for, tiny
from tersenet.errors import DataError, NoEffect, SettingsError
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.pruning.prune_weights import PruneWeights
from tersenet.pruning.rewind import Rewind
from tersenet.recipe import Recipe
from tersenet.repeat import Repeat
from tersenet.step import Companion, Plan, Step
from tersenet.task import Task
from tersenet.train import Train


@dataclass(frozen=True, kw_only=True)
class Blind(Step):
    """A step whose loss is known: each round answers `count` more of 100 images wrongly."""

    count: int = 3
    rounds: int = 99

    def plan(self, model: nn.Module, task: Task) -> Plan:
        return {"wrong": min(wrong_of(model) + self.count, self.count * self.rounds)}

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        model.wrong[: plan["wrong"]] = True  # type: ignore[operator,index]
        return model


def wrong_of(model: Any) -> int:
    return int(model.wrong.sum())


class Oracle(nn.Module):
    """Inputs (N, 1) number images 0..99 of class 0; where the mask `wrong` is true they are answered with class 1."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("wrong", torch.zeros(100, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        answer = self.wrong[x[:, 0].long()].long()
        return nn.functional.one_hot(answer, 2).float()


def numbered(label: int = 0) -> list[tuple[Tensor, Tensor]]:
    x = torch.arange(100.0)[:, None]
    return [(x[i : i + 20], torch.full((20,), label)) for i in range(0, 100, 20)]


def oracle_task(**data: Any) -> Task:
    return Task(example=torch.zeros(2, 1), quiet=True, **data)


def repeat(model: nn.Module, task: Task, **settings: Any) -> tuple[nn.Module, Plan]:
    return Repeat(**{"steps": (Blind(),), **settings}).run(model, task)


@pytest.mark.parametrize(("allowed", "kept"), [(3.0, 1), (8.9, 2), (9.0, 3), (50.0, 10)])
def test_the_last_round_within_the_drop_is_kept(allowed: float, kept: int) -> None:
    model, plan = repeat(Oracle(), oracle_task(validate=numbered()), until_drop=allowed)
    assert wrong_of(model) == 3 * kept
    assert [entry["drop"] for entry in plan["rounds"]] == pytest.approx([3 * (i + 1) for i in range(kept)])
    assert plan["judged_by"] == "score on the held-out set"
    assert plan["ended_by"] == (
        "10 rounds were asked for" if kept == 10 else f"round {kept + 1} lost {3 * kept + 3}.00 points"
    )


def test_the_test_set_is_never_looked_at() -> None:
    class Hidden:
        def __iter__(self) -> Any:
            raise AssertionError("the test set was read")

    for task in (oracle_task(train=numbered(), test=Hidden()), oracle_task(validate=numbered(), test=Hidden())):
        assert len(repeat(Oracle(), task, until_drop=7.0)[1]["rounds"]) == 2


def test_without_a_held_out_set_agreement_counts_and_labels_do_not() -> None:
    """All labels are wrong, so that a score would even rise."""
    for data in ({"train": numbered(label=1)}, {"calibrate": [(x,) for x, _ in numbered()]}):
        model, plan = repeat(Oracle(), oracle_task(**data), until_drop=7.0)
        assert wrong_of(model) == 6
        assert plan["judged_by"] == "agreement on training images"


def test_a_held_out_set_goes_before_agreement() -> None:
    model, _ = repeat(Oracle(), oracle_task(train=numbered(), validate=numbered(label=1)), until_drop=0.0)
    assert wrong_of(model) == 30, "each wrong answer is right by the held-out labels"


def test_the_drop_counts_from_the_model_that_came_in() -> None:
    model = Oracle()
    model.wrong[:40] = True  # type: ignore[index,operator]
    for task in (oracle_task(validate=numbered(), original=Oracle()), oracle_task(train=numbered(), original=Oracle())):
        assert wrong_of(repeat(copy.deepcopy(model), task, until_drop=4.0)[0]) == 43


def test_agreement_reads_only_as_many_images_as_asked_for() -> None:
    """The first 40 images: 3 wrong are 7.5 points."""
    _, plan = repeat(Oracle(), oracle_task(train=numbered()), until_drop=8.0, images=33)
    assert [entry["drop"] for entry in plan["rounds"]] == pytest.approx([7.5])


def test_it_is_judged_on_images_that_no_training_reads() -> None:
    asked = []

    class Epochs(list):
        def at(self, epoch: int, start: int = 0) -> Any:
            asked.append(epoch)
            return iter(self[start:])

    repeat(Oracle(), oracle_task(train=Epochs(numbered())), until_drop=3.0)
    assert min(asked) > 10_000


def test_without_a_drop_the_rounds_are_counted_and_need_no_data() -> None:
    model, plan = repeat(Oracle(), oracle_task(), until_drop=None, at_most=4)
    assert wrong_of(model) == 12
    assert plan["judged_by"] == "nothing"
    assert Repeat(steps=(Blind(),), until_drop=None).data_needed() == "nothing"
    assert Repeat(steps=(Blind(),)).data_needed() == "inputs"
    assert Repeat(steps=(Blind(), Train())).data_needed() == "labels"


def test_a_round_that_takes_nothing_more_away_ends_it() -> None:
    model, plan = repeat(Oracle(), oracle_task(validate=numbered()), until_drop=90.0, steps=(Blind(rounds=2),))
    assert len(plan["rounds"]) == 2
    assert plan["ended_by"] == "round 3 took nothing more away"
    assert wrong_of(model) == 6


def test_where_the_first_round_loses_too_much_the_model_stays_and_that_is_said() -> None:
    model = Oracle()
    with pytest.warns(NoEffect, match=r"round 1 lost 3\.00 points"):
        same, plan = repeat(model, oracle_task(validate=numbered()), until_drop=2.0)
    assert same is model
    assert plan == {}
    assert wrong_of(model) == 0


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(DataError, match="--validate"):
        repeat(Oracle(), oracle_task())
    with pytest.raises(SettingsError, match="--validate"):
        repeat(Oracle(), oracle_task(train=numbered(), metric=lambda outputs, batch: outputs[:, 0]))


@pytest.mark.parametrize(
    "settings", [{"steps": ()}, {"until_drop": -0.1}, {"until_drop": float("nan")}, {"at_most": 0}, {"images": 0}]
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        Repeat(**{"steps": (Blind(),), **settings})


def test_it_survives_yaml() -> None:
    recipe = Recipe((Repeat(steps=(PruneChannels(sparsity=0.2), Train(epochs=3)), until_drop=None, at_most=7),))
    assert Recipe.parse(recipe.dump(), steps={"repeat": Repeat}) == recipe


def test_rounds_take_ever_more_and_replay_in_order_on_a_fresh_model() -> None:
    model, task = tiny(), task_for(tiny())
    step = Repeat(steps=(PruneChannels(sparsity=0.25, refit=False),), until_drop=100.0, at_most=2, images=64)
    changed, plan = step.run(copy.deepcopy(model), task)
    widths = [entry["plan"]["steps"][0]["plan"]["kept"]["pointwise"]["in"] for entry in plan["rounds"]]
    assert [len(kept) for kept in widths] == [12, 9]
    again = step.apply(tiny(1), json.loads(json.dumps(plan)))
    again.load_state_dict(changed.state_dict())
    assert torch.equal(again.eval()(task.example), changed.eval()(task.example))
    with pytest.raises(SettingsError, match="the plan is of"):
        Repeat(steps=(Train(),)).apply(copy.deepcopy(model), plan)


def test_lottery_tickets(tmp_path: Path) -> None:
    """A fifth of what is left goes in each round, and what stays begins again from the early weights."""
    early = _net(50)
    save_file(early.state_dict(), tmp_path / "early.safetensors")
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 3, generator=generator), torch.arange(8) % 2)]
    task = Task(example=data[0][0][:2], train=data, quiet=True)
    model, _ = Train(epochs=2, learning_rate=0.1, logger="none").run(copy.deepcopy(early), task)
    steps = (PruneWeights(percentile=20, scope="global"), Rewind(to=str(tmp_path / "early.safetensors")))
    ticket, plan = Repeat(steps=steps, until_drop=None, at_most=3).run(copy.deepcopy(model), task)
    layers = [(ticket[index], early[index]) for index in (0, 2)]  # type: ignore[index]
    weights = torch.cat([layer.weight.detach().flatten() for layer, _ in layers])
    assert float((weights != 0).double().mean()) == pytest.approx(0.8**3, abs=0.01)
    for layer, was in layers:
        assert torch.equal(layer.weight, torch.where(layer.weight != 0, was.weight, 0.0))
        assert torch.equal(layer.bias, was.bias)
    again = Repeat(steps=steps, until_drop=None).apply(_net(50), json.loads(json.dumps(plan)))
    again.load_state_dict(ticket.state_dict())
    assert torch.equal(again(task.example), ticket(task.example))


@dataclass(frozen=True, kw_only=True)
class Narrow(Step):
    """Takes the last of the hidden units of a two-layer net."""

    def plan(self, model: nn.Module, task: Task) -> Plan:
        return {"width": model[0].out_features - 1}  # type: ignore[index,operator]

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        return _net(plan["width"], model)


def _net(width: int, like: nn.Module | None = None) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))
    if like is not None:
        net.load_state_dict({key: value[tuple(map(slice, net.state_dict()[key].shape))]
                             for key, value in like.state_dict().items()})  # fmt: skip
    return net.eval()


class Cut(BaseException):
    """Stands for a kill."""


@dataclass(frozen=True, kw_only=True)
class Cutting(Companion):
    """Counts the batches that are trained on, and kills the process before the last that it is allowed."""

    left: ClassVar[list[int]] = [10**9]

    def tick(self, model: nn.Module, progress: float) -> None:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise Cut


@pytest.mark.parametrize("left", [2, 8, 13, 23])
def test_a_cut_repetition_goes_on_and_ends_with_the_same_bits(left: int, tmp_path: Path) -> None:
    """Three rounds of two epochs of four batches, cut inside and between them."""
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 3, generator=generator), torch.arange(8) % 2) for _ in range(4)]
    task = Task(example=data[0][0][:2], train=data, quiet=True)
    train = Train(epochs=2, learning_rate=0.1, save_every_s=0.0, logger="none", companions=(Cutting(),))
    step = Repeat(steps=(Narrow(), train), until_drop=100.0, at_most=3, images=16)

    def run(folder: str, allowed: int) -> tuple[nn.Module, Plan, int]:
        Cutting.left[0] = allowed
        found = step.run(_net(8), dataclasses.replace(task, folder=tmp_path / folder))
        return *found, allowed - Cutting.left[0]

    whole, plan, spent = run("whole", 1000)
    assert spent == 24
    with pytest.raises(Cut):
        run("cut", left)
    again, plan_again, spent = run("cut", 1000)
    assert plan_again == plan
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())
    assert left + spent <= 25, "what was trained before the cut was trained again"
