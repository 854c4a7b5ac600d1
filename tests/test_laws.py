"""Every step through every law, and a planted fault for each law to show that it can fail."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import laws
from cases import CASES, task_for, tiny
from tersenet.errors import SettingsError, TraceError
from tersenet.recipe import STEPS
from tersenet.step import Plan, Step, layers
from tersenet.task import Task

NAMES = sorted(CASES)


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> Any:
    found = CASES[request.param]
    model = found.model(0)
    return found, model, task_for(model)


def test_the_table_has_every_step() -> None:
    assert {case.step.name for case in CASES.values()} == set(STEPS)


def test_plan_leaves_the_model(case: Any) -> None:
    laws.plan_leaves_the_model(case[0].step, *case[1:])


def test_plan_survives_json(case: Any) -> None:
    laws.plan_survives_json(case[0].step, *case[1:])


def test_settings_survive_yaml(case: Any) -> None:
    laws.settings_survive_yaml(case[0].step, *case[1:])


def test_plan_and_numbers_are_the_model(case: Any) -> None:
    found, model, task = case
    laws.plan_and_numbers_are_the_model(found.step, model, task, found.model(7))


def test_change_is_said(case: Any) -> None:
    laws.change_is_said(case[0].step, *case[1:])


@pytest.mark.parametrize(
    "name", [name for name in NAMES if CASES[name].step.changes_structure and CASES[name].step.chooses_layers]
)
def test_matching_nothing_is_said(name: str) -> None:
    found = CASES[name]
    model = found.model(0)
    laws.change_is_said(dataclasses.replace(found.step, skip=("*",)), model, task_for(model))


@pytest.mark.parametrize("setting", ["only", "skip"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_no_layer_has_is_refused(name: str, setting: str) -> None:
    found = CASES[name]
    model = found.model(0)
    with pytest.raises(SettingsError, match="no such layer"):
        dataclasses.replace(found.step, **{setting: ("no such layer",)}).run(model, task_for(model))


def test_shape_is_kept(case: Any) -> None:
    laws.shape_is_kept(case[0].step, *case[1:])


def test_zero_strength_is_harmless(case: Any) -> None:
    found, model, task = case
    if found.zero is not None:
        laws.zero_strength_is_harmless(found.zero, model, task, found.tolerance)


@pytest.mark.minutes
def test_file_is_the_model(case: Any, tmp_path: Path) -> None:
    laws.file_is_the_model(case[0].step, *case[1:], tmp_path)


@dataclass(frozen=True, kw_only=True)
class Scale(Step):
    """A step that keeps the laws: multiplies the weights of linear layers. Each fault below breaks one thing."""

    factor: float = 1.0

    def plan(self, model: nn.Module, task: Task) -> Plan:
        return {"paths": [path for path, _ in layers(model, (nn.Linear,), self)]}

    def fit(self, model: nn.Module, task: Task) -> None:
        for _, layer in layers(model, (nn.Linear,), self):
            layer.weight.data.mul_(self.factor)


class PlanWrites(Scale):
    def plan(self, model: nn.Module, task: Task) -> Plan:
        model.linear.weight.data.add_(1e-6)
        return super().plan(model, task)


class PlanDraws(Scale):
    def plan(self, model: nn.Module, task: Task) -> Plan:
        torch.rand(1)
        return super().plan(model, task)


class PlanIsNotJson(Scale):
    def plan(self, model: nn.Module, task: Task) -> Plan:
        return {0: (1, 2)}


@dataclass(frozen=True, kw_only=True)
class SettingsDrift(Scale):
    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "factor", self.factor + 1)


class ApplyDraws(Scale):
    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        model.linear.hidden = torch.randn(6)
        model.linear.register_forward_hook(lambda layer, _, output: output + layer.hidden)
        return model


class ChangesInSilence(Scale):
    def plan(self, model: nn.Module, task: Task) -> Plan:
        return {}

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        model.linear = nn.Sequential(model.linear)
        return model


class LosesAnOutput(Scale):
    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        model.linear = nn.Linear(16, 5)
        return model


class HookUnseenByTheExporter(Scale):
    def fit(self, model: nn.Module, task: Task) -> None:
        real = model.forward
        model.forward = lambda x: real(x) * (1.0 if torch.compiler.is_exporting() else 1.5)


class HookUnseenByTheComparison(Scale):
    """Neither does the capture see it, which is compared with the model on three samples at most."""

    def fit(self, model: nn.Module, task: Task) -> None:
        real = model.forward
        model.forward = lambda x: real(x) * (1.0 if torch.compiler.is_exporting() or len(x) <= 3 else 1.5)


def test_the_honest_step_keeps_all_laws(tmp_path: Path) -> None:
    model, step = tiny(0), Scale(factor=0.5)
    task = task_for(model)
    for law in (
        laws.plan_leaves_the_model,
        laws.plan_survives_json,
        laws.settings_survive_yaml,
        laws.change_is_said,
        laws.shape_is_kept,
    ):
        law(step, model, task)
    laws.plan_and_numbers_are_the_model(step, model, task, tiny(7))
    laws.zero_strength_is_harmless(Scale(factor=1.0), model, task, 1e-6)
    laws.file_is_the_model(step, model, task, tmp_path)


@pytest.mark.parametrize(
    ("law", "faulty", "more"),
    [
        (laws.plan_leaves_the_model, PlanWrites(), ()),
        (laws.plan_leaves_the_model, PlanDraws(), ()),
        (laws.plan_survives_json, PlanIsNotJson(), ()),
        (laws.settings_survive_yaml, SettingsDrift(), ()),
        (laws.plan_and_numbers_are_the_model, ApplyDraws(), (tiny(7),)),
        (laws.change_is_said, ChangesInSilence(), ()),
        (laws.shape_is_kept, LosesAnOutput(), ()),
        (laws.zero_strength_is_harmless, Scale(factor=1.01), (1e-5,)),
        (laws.file_is_the_model, HookUnseenByTheComparison(), (Path("unused"),)),
    ],
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_a_planted_fault_breaks_the_law(law: Any, faulty: Step, more: tuple, tmp_path: Path) -> None:
    model = tiny(0)
    more = tuple(tmp_path if isinstance(value, Path) else value for value in more)
    with pytest.raises(AssertionError):
        law(faulty, model, task_for(model), *more)


def test_a_hook_unseen_by_the_exporter_writes_no_file(tmp_path: Path) -> None:
    model = tiny(0)
    with pytest.raises(TraceError, match="gives other outputs than its captured graph"):
        laws.file_is_the_model(HookUnseenByTheExporter(), model, task_for(model), tmp_path)
    assert list(tmp_path.iterdir()) == []
