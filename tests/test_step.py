"""The contract itself: matching, chains, what is said when nothing happens and when something fails."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized

from tersenet.errors import MadePermanent, ModelError, NoEffect, SettingsError
from tersenet.left_alone import LeftAlone, listening
from tersenet.pruning.penalties import GroupLasso
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.pruning.ramp import Ramp
from tersenet.repeat import Repeat
from tersenet.search.search import Search
from tersenet.step import Chain, Plan, Step, layers, replace, snake_case
from tersenet.task import Task

TASK = Task(example=torch.zeros(2, 4))


@dataclass(frozen=True, kw_only=True)
class Widen(Step):
    """A step for these tests: adds a bias of `by` to each linear layer's output."""

    by: float = 1.0

    def plan(self, model: nn.Module, task: Task) -> Plan:
        return {path: self.by for path, _ in layers(model, (nn.Linear,), self)}

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        for path, by in plan.items():
            layer = model.get_submodule(path)
            layer.bias = nn.Parameter(layer.bias.detach() + by)
        return model


@dataclass(frozen=True, kw_only=True)
class Fail(Step):
    changes_structure: ClassVar[bool] = False

    def fit(self, model: nn.Module, task: Task) -> None:
        raise ModelError("it cannot be done")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2), nn.Dropout()))


def test_names_are_snake_case() -> None:
    assert [snake_case(name) for name in ("PruneChannels", "FoldBatchNorm", "Train")] == [
        "prune_channels",
        "fold_batch_norm",
        "train",
    ]


@pytest.mark.parametrize(
    ("only", "skip", "expected"),
    [
        ((), (), ["0", "2.0"]),
        (("2.*",), (), ["2.0"]),
        ((), ("0",), ["2.0"]),
        (("Linear",), ("2.?",), ["0"]),
        ((), ("linear",), []),
        (("conv2d",), (), []),
    ],
)
def test_only_and_skip_choose_by_path_wildcard_and_type(only: tuple, skip: tuple, expected: list) -> None:
    found = [path for path, _ in layers(net(), (nn.Linear,), Widen(only=only, skip=skip))]
    assert found == expected


def test_a_bare_string_as_pattern_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"write skip: \[linear\]"):
        Widen(skip="linear")  # type: ignore[arg-type]


def test_a_step_that_matched_nothing_says_so() -> None:
    with pytest.warns(NoEffect, match="widen matched no layer"):
        _model, plan = Widen(only=("Dropout",)).run(net(), TASK)
    assert plan == {}


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("lienar", r"skip names 'lienar', and no layer .* did you mean Linear\?"),
        ("3.*", r"skip names '3\.\*', and no layer of this model"),
        ("conv2d", "there are 0, 1, 2.0, 2.1"),
        ("2", r"skip names '2', which holds layers and is none itself; write '2\.\*'"),
        ("Sequential", "holds layers and is none itself; name the layers in it"),
    ],
)
def test_a_pattern_that_is_about_no_layer_is_refused(pattern: str, said: str) -> None:
    with pytest.raises(SettingsError, match=f"^widen: .*{said}"):
        Widen(skip=("0", pattern)).run(net(), TASK)


def test_names_of_a_chain_are_checked_before_anything_runs() -> None:
    typo = Chain(steps=(Chain(steps=(Widen(only=("2.9",)),)),))
    model = net()
    bias = model[0].bias.detach().clone()
    with pytest.raises(SettingsError, match=r"widen: only names '2\.9'.* did you mean 2\.\d"):
        Chain(steps=(Widen(), typo)).run(model, TASK)
    assert torch.equal(model[0].bias, bias)


@dataclass(frozen=True, kw_only=True)
class Shorten(Step):
    """Takes the layer "2.0" away; what it makes is new where `makes_layers` says so."""

    def plan(self, model: nn.Module, task: Task) -> Plan:
        return {"gone": "2.0"}

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        return replace(model, {"2": nn.Sequential(nn.Identity()), "1": nn.Sequential(nn.Linear(4, 4))})


@dataclass(frozen=True, kw_only=True)
class Renew(Shorten):
    makes_layers: ClassVar[bool] = True


def test_a_layer_that_an_earlier_step_took_away_is_said_and_no_error() -> None:
    with pytest.warns(NoEffect, match=r"widen: skip names '2\.1', which an earlier step took out of the model"):
        Chain(steps=(Shorten(), Chain(steps=(Widen(skip=("2.1",)),)))).run(net(), TASK)
    with pytest.raises(SettingsError, match=r"only names '2\.1'"):
        Widen(only=("2.1",)).run(Shorten().run(net(), TASK)[0], TASK)


def test_names_of_new_layers_are_checked_when_they_are_there() -> None:
    Chain(steps=(Renew(), Widen(only=("1.0",)))).run(net(), TASK)
    with pytest.raises(SettingsError, match=r"only names '1\.0'"):
        Chain(steps=(Shorten(), Widen(only=("1.0",)))).run(net(), TASK)
    with pytest.raises(SettingsError, match=r"only names '1\.9'"):
        Chain(steps=(Renew(), Widen(only=("1.9",)))).run(net(), TASK)


def test_a_chain_is_a_step_and_replays() -> None:
    chain = Chain(steps=(Widen(by=1.0), Chain(steps=(Widen(by=2.0, only=("0",)),))))
    original = net()
    state = {key: value.clone() for key, value in original.state_dict().items()}
    plan = chain.plan(original, TASK)
    assert all(torch.equal(state[key], value) for key, value in original.state_dict().items())
    replayed = chain.apply(original, plan)
    assert torch.allclose(replayed[0].bias, state["0.bias"] + 3.0)
    assert torch.allclose(replayed[2][0].bias, state["2.0.bias"] + 1.0)


def test_a_chain_refuses_the_plan_of_another() -> None:
    plan = Chain(steps=(Widen(),)).plan(net(), TASK)
    with pytest.raises(SettingsError, match="the plan is of"):
        Chain(steps=(Widen(), Widen())).apply(net(), plan)


def test_an_error_names_its_step_once() -> None:
    with pytest.raises(ModelError) as caught:
        Chain(steps=(Widen(), Chain(steps=(Fail(),)))).run(net(), TASK)
    assert str(caught.value) == "fail: it cannot be done"


def test_replace_can_replace_the_root() -> None:
    model = net()
    assert replace(model, {"2.0": nn.Identity()}) is model
    assert isinstance(model[2][0], nn.Identity)
    root = nn.Identity()
    assert replace(model, {"": root}) is root


def hooked(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*weight_norm.* is deprecated", FutureWarning)
        torch.nn.utils.weight_norm(model[0])
    return model


def parametrized(model: nn.Module) -> nn.Module:
    parametrizations.weight_norm(model[0])
    return model


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


def doubled(model: nn.Module) -> nn.Module:
    model[0] = Doubled(4, 4)
    return model


@pytest.mark.parametrize("change", [hooked, parametrized, doubled, nn.DataParallel])
def test_a_step_that_is_called_by_itself_opens_the_model(change: Callable[[nn.Module], nn.Module]) -> None:
    model = change(net()).eval()
    x = torch.randn(2, 4)
    before = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MadePermanent)
        made, plan = Widen(by=0.0).run(model, TASK)
    assert list(plan) == ["0", "2.0"]
    assert not any(is_parametrized(module) or module._forward_pre_hooks for module in made.modules())
    assert torch.allclose(made(x), before, atol=1e-6)


@pytest.mark.parametrize(
    "step",
    [
        Chain(steps=(Widen(by=0.0),)), Repeat(steps=(PruneChannels(refit=False),), until_drop=None, at_most=1),
        Search(macs="0.5x", images=0, steps=(PruneChannels(),)),
    ],
    ids=["chain", "repeat", "search"],
)  # fmt: skip
def test_what_holds_steps_plans_for_a_model_that_torch_cannot_copy(step: Step) -> None:
    model = hooked(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2), nn.Dropout())).eval()
    before = model(torch.ones(2, 4))  # leaves the computed weight with its history
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MadePermanent)
        assert step.plan(model, TASK)
    assert torch.equal(model(torch.ones(2, 4)), before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MadePermanent)
        made, plan = step.run(model, TASK)
    assert plan
    assert not any(module._forward_pre_hooks for module in made.modules())


def test_nothing_is_asked_of_a_step_that_nobody_hears() -> None:
    asked = []

    @dataclass(frozen=True, kw_only=True)
    class Telling(Widen):
        def left_alone(self, model: nn.Module, plan: Plan, task: Task) -> LeftAlone | None:
            asked.append(self.by)
            return LeftAlone("weights", 0.5, ())

    @dataclass(frozen=True, kw_only=True)
    class Outer(Step):
        def plan(self, model: nn.Module, task: Task) -> Plan:
            Telling(by=2.0).run(copy.deepcopy(model), task)
            return {"tried": True}

    Telling(by=1.0).run(net(), TASK)
    assert asked == []
    with listening() as heard:
        Chain(steps=(Outer(), Telling(by=3.0))).run(net(), TASK)
    assert asked == [3.0]
    assert [name for name, _ in heard] == ["telling"]


def test_a_companion_takes_patterns_as_a_step_does() -> None:
    with pytest.raises(SettingsError, match=r"write only: \[linear\]"):
        GroupLasso(only="linear")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"margin is 0\.2, which changes nothing here: it is for regrow: true"):
        Ramp(sparsity=0.5, regrow=False, margin=0.2)
