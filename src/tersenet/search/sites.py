"""The sites of a search: every place where a step can pick a setting, and which of them touch the same layers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tersenet.graph.trace import trace
from tersenet.step import Plan, Step
from tersenet.task import Task

# What is picked: index of the step -> place -> setting. Places at their first setting may be left out.
Picks = dict[int, dict[str, Any]]


@dataclass(frozen=True)
class Site:
    """A place where one step can pick.

    Args:
        step: index of the step.
        place: path in the model.
        settings: JSON; the first leaves the place as it is.
        layers: paths of the layers that change.
        kind: what these layers are; sites of one kind cost the same, setting by setting. A hash of the layers' types,
            sizes and shapes, of the settings, and of the steps around.
        said: the same in words.
    """

    step: int
    place: str
    settings: tuple[Any, ...]
    layers: tuple[str, ...]
    kind: str
    said: str

    @property
    def key(self) -> tuple[int, str]:
        return self.step, self.place

    def holds(self, other: Site) -> bool:
        """Whether the other place lies inside this one, and so goes with it."""
        return other.place.startswith(self.place + ".")


def find_sites(
    steps: Sequence[Step], model: nn.Module, task: Task, known: Mapping[str, str] | None = None
) -> list[Site]:
    """All sites of some steps, in the steps' order. Touches nothing.

    Args:
        known: what `describe` says of the model, where that was asked already.
    """
    known = describe(model, task.example) if known is None else known
    around = context(steps)
    found = []
    for index, step in enumerate(steps):
        for place, settings in (step.choices(model, task) if step.tunable and not step.changes_task else {}).items():
            if len(settings) < 2:
                continue
            layers = _reached(step, place, settings[-1], model, task, known)
            said = " + ".join(known[path] for path in layers)
            digest = hashlib.sha256(f"{step.name}|{said}|{around}|{settings}".encode()).hexdigest()[:16]
            found.append(Site(index, place, tuple(settings), layers, digest, said))
    return found


def _reached(
    step: Step, place: str, setting: Any, model: nn.Module, task: Task, known: Mapping[str, str]
) -> tuple[str, ...]:
    """The layers that a setting changes. Widths (whole numbers) reach other layers, so that the plan is asked; anything
    else stays within its place."""
    if isinstance(setting, int):
        changed = step.chosen({place: setting})
        assert changed is not None, f"{step.name} chose {setting} at {place} and has nothing to do"
        return touched(changed.plan(model, task), known)
    return touched({"": [place]}, known)


def context(steps: Sequence[Step]) -> str:
    """What every candidate goes through whatever is picked, and so what a layer costs with: a thin layer saves another
    time in int8 than in float."""
    return ", ".join(step.name for step in steps if step.family != "train")


def touched(plan: Plan, known: Mapping[str, str]) -> tuple[str, ...]:
    """The layers that a plan changes: those that it names, and those inside a module that it names."""
    names: list[str] = []
    for value in plan.values():
        names += [str(each) for each in value] if isinstance(value, dict | list) else []
    return tuple(path for path in known if any(path == name or path.startswith(name + ".") for name in names))


def describe(model: nn.Module, example: torch.Tensor) -> dict[str, str]:
    """Path of a layer with a weight -> its type, size and shapes in words, such as "Conv2d 16>32 3x3/2 @32x32"."""
    found: dict[str, str] = {}
    graph = trace(model, example)
    for node in graph.graph.nodes:
        if node.op != "call_module":
            continue
        layer: Any = graph.get_submodule(str(node.target))
        if not isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
            continue
        into, out = node.args[0].meta["shape"], node.meta["shape"]
        where = "x".join(map(str, into[2:])) or "1"
        if isinstance(layer, nn.Linear):
            text = f"Linear {layer.in_features}>{layer.out_features}"
        else:
            kernel, stride = "x".join(map(str, layer.kernel_size)), layer.stride[0]
            groups = f" g{layer.groups}" if layer.groups > 1 else ""
            text = f"{type(layer).__name__} {into[1]}>{out[1]} {kernel}/{stride}{groups} @{where}"
        found[str(node.target)] = text
    return found


def configured(steps: Sequence[Step], picks: Picks) -> list[Step]:
    """The steps with what was picked; steps without choices as they are, steps that have nothing to do left out."""
    made = []
    for index, step in enumerate(steps):
        chosen = step.chosen(picks[index]) if index in picks else step
        if chosen is not None:
            made.append(chosen)
    return made


def complete(picks: Picks, sites: Sequence[Site]) -> Picks:
    """Every step of the sites appears, so that those without a pick do nothing."""
    full: Picks = {site.step: {} for site in sites}
    for index, places in picks.items():
        full.setdefault(index, {}).update(places)
    return full


def picks_key(picks: Picks) -> str:
    """Picks in short, equal for equal picks: a hash."""
    picked = {str(index): places for index, places in picks.items() if places}
    return hashlib.sha256(json.dumps(picked, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(known: Mapping[str, str], sites: Sequence[Site], around: str) -> str:
    """What a network and its choices are, by the layers' types, sizes and shapes; weights do not count.

    Args:
        known: of `describe`.
        around: of `context`.
    """
    choices = [(site.key, site.settings) for site in sites]
    return hashlib.sha256(json.dumps([known, choices, around], sort_keys=True).encode()).hexdigest()[:16]
