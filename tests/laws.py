"""The laws that every step keeps, as functions that raise AssertionError where one is broken."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import torch
from torch import fx, nn

from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.runtimes import open_file
from tersenet.errors import NoEffect
from tersenet.recipe import Recipe
from tersenet.step import Plan, Step
from tersenet.task import Task


def picture(model: nn.Module) -> tuple:
    """Everything of a model that plan must leave alone: structure, modes, attributes, numbers."""
    attributes = [
        (path, type(module).__name__, module.training, module.extra_repr(), sorted(vars(module)))
        for path, module in model.named_modules()
    ]
    return attributes, {key: value.clone() for key, value in model.state_dict().items()}


def same_picture(a: tuple, b: tuple) -> bool:
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(torch.equal(a[1][key], b[1][key]) for key in a[1])


def structure(model: nn.Module) -> list[tuple]:
    """Names, types and shapes, without numbers. A captured graph is called anything: a copy of it loses its name."""
    modules = [
        (path, "graph" if isinstance(module, fx.GraphModule) else type(module).__name__)
        for path, module in model.named_modules()
    ]
    return modules + [(key, tuple(value.shape), value.dtype) for key, value in model.state_dict().items()]


def outputs(model: nn.Module, task: Task) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return torch.cat([task.forward(model, batch) for batch in task.test])


def run(step: Step, model: nn.Module, task: Task) -> tuple[nn.Module, Plan]:
    """Runs a step on a copy; NoEffect is looked at by its own law."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffect)
        return step.run(copy.deepcopy(model), task)


def plan_leaves_the_model(step: Step, model: nn.Module, task: Task) -> None:
    """Law 1."""
    before, random = picture(model), torch.random.get_rng_state()
    step.plan(model, task)
    assert same_picture(before, picture(model)), "plan changed the model"
    assert torch.equal(random, torch.random.get_rng_state()), "plan drew from the global random numbers"


def plan_survives_json(step: Step, model: nn.Module, task: Task) -> None:
    """Law 2."""
    plan = run(step, model, task)[1]
    assert json.loads(json.dumps(plan)) == plan, "the plan is not plain JSON"


def settings_survive_yaml(step: Step, model: nn.Module, task: Task) -> None:
    """Law 3."""
    recipe = Recipe((step,))
    assert Recipe.parse(recipe.dump(), steps={step.name: type(step)}) == recipe, "the settings came back different"


def plan_and_numbers_are_the_model(step: Step, model: nn.Module, task: Task, fresh: nn.Module) -> None:
    """Law 4: the plan on a fresh model, then the numbers, under another random seed."""
    changed, plan = run(step, model, task)
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        replayed = step.apply(copy.deepcopy(fresh), json.loads(json.dumps(plan)))
    assert structure(replayed) == structure(changed), "the replayed structure differs"
    replayed.load_state_dict(changed.state_dict())
    assert torch.equal(outputs(replayed, task), outputs(changed, task)), "the replayed model computes something else"


def change_is_said(step: Step, model: nn.Module, task: Task) -> None:
    """Law 5: a changed structure has a plan; no plan on a step that changes structure is a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NoEffect)
        changed, plan = step.run(copy.deepcopy(model), task)
    assert plan or structure(changed) == structure(model), "the structure changed and the plan is empty"
    said = any(issubclass(warning.category, NoEffect) for warning in caught)
    assert said == (step.changes_structure and not plan), (
        "nothing happened and nothing was said, or the other way round"
    )


def shape_is_kept(step: Step, model: nn.Module, task: Task) -> None:
    """Law 6."""
    changed, _ = run(step, model, task)
    was, now = model(task.example), changed.eval()(task.example)
    assert was.shape == now.shape, "the output has another shape"
    assert bool(torch.isfinite(now).all()), "the output is not finite"


def zero_strength_is_harmless(step: Step, model: nn.Module, task: Task, tolerance: float) -> None:
    """Law 7: `step` is at zero strength; `tolerance` is a share of the largest output."""
    before = outputs(model, task)
    after = outputs(run(step, model, task)[0], task)
    error = float((before - after).abs().max() / before.abs().max())
    assert error <= tolerance, f"outputs moved by {error:.2g} of the largest, {tolerance:.2g} is allowed"


def file_is_the_model(step: Step, model: nn.Module, task: Task, folder: Path, tolerance: float = 1e-4) -> None:
    """Law 8: the exported file gives the same outputs. One rounding step more or less is allowed for int8."""
    changed, _ = run(step, model, task)
    path = export_onnx(changed, task.example, folder / "model.onnx", task.preparation)
    expected = outputs(changed, task)
    got = torch.from_numpy(open_file(path).run(torch.cat([batch[0] for batch in task.test]).numpy()))
    if any("quant" in type(module).__name__.lower() for module in changed.modules()):
        tolerance = 0.02
    error = float((expected - got).abs().max() / expected.abs().max())
    assert error <= tolerance, f"the file is {error:.2g} of the largest output away, {tolerance:.2g} is allowed"
