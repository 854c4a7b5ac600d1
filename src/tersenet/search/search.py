"""`Search`: one budget of latency, bytes, multiply-adds or memory, spent over the choices of several steps.

What a pick saves is measured in the runtime (table.py, costs.py), what it hurts is the divergence that it causes alone
(sensitivity.py), the picks come from an integer program (solver.py), and the best few are timed and compared for real
(proposals.py). The steps themselves are known only by their contract.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from tersenet.bricks.opened import copied
from tersenet.cache import cache_folder
from tersenet.errors import InputWarning, NoEffect, SettingsError
from tersenet.graph.taken_apart import opened
from tersenet.left_alone import trying
from tersenet.named import foresee_names, hits
from tersenet.search.bench import check_runtime, collected_once, images_of, working_folder
from tersenet.search.between import between
from tersenet.search.costs import Costs
from tersenet.search.ground import Budget, Ground, NoChoice
from tersenet.search.proposals import Proposal, compare, propose
from tersenet.search.sensitivity import Losses, find_losses
from tersenet.search.sites import Picks, configured, context
from tersenet.search.situations import Situation, situations
from tersenet.search.table import Table
from tersenet.search.ways import Way, first_to_reach, possible_ways, without
from tersenet.step import Chain, Plan, Step
from tersenet.task import Task

# Times that an answer which misses in a process of its own makes the search aim lower.
_CONFIRMATIONS = 3
_UNITS = {"latency": "ms", "bytes": "bytes", "macs": "multiply-adds", "memory": "bytes of memory"}


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        steps: the steps with their settings picked; a recipe.
        picks: what was picked.
        left_out: names of steps that do not pay here.
        met: whether the budget is met by what was measured.
        said: everything that a reader would ask, as JSON.
        wider: whether the picks are among the steps' wider choices.
    """

    steps: tuple[Step, ...]
    picks: Picks
    left_out: tuple[str, ...]
    met: bool
    said: dict[str, Any] = field(repr=False)
    wider: bool = False


@dataclass
class _Answer:
    """What one situation gave: the best of some proposals, its cost confirmed."""

    ground: Ground
    way: Way
    situation: Situation
    best: Proposal
    proposals: list[Proposal]

    @property
    def met(self) -> bool:
        return self.best.cost <= self.ground.limit

    @property
    def rank(self) -> tuple[bool, float]:
        """What meets the budget comes before what does not; then the least loss, else the least cost."""
        return not self.met, (self.best.loss or 0.0) if self.met else self.best.cost / self.ground.limit

    def to_json(self, each: Proposal) -> dict[str, Any]:
        return {**each.to_json(self.ground.steps), **({"inputs": self.situation.said} if self.situation.said else {})}


def _answers(ground: Ground, losses: Losses, aim: float, known: list[Proposal]) -> tuple[list[Proposal], Proposal]:
    """(all answers so far, the cheapest of them); where none is within the aim, what costs least whatever it hurts is
    among them."""
    found = list(known)

    def add(answers: list[Proposal]) -> None:
        found.extend(each for each in answers if all(each.picks != other.picks for other in found))

    add(propose(ground.sites, ground.costs, losses, aim, ground.measured))
    if not any(each.cost <= aim for each in found):
        found.append(ground.least(found))
    low = max((each for each in found if each.cost <= aim), key=lambda each: each.cost, default=None)
    if low is not None:
        for high in _missed(found, aim):
            add(between(ground.sites, ground.costs, losses, aim, (low, high), ground.measured))
    return found, min(found, key=lambda each: each.cost)


def _missed(found: list[Proposal], aim: float) -> list[Proposal]:
    """The nearest answer of each kind that weighs losses and has none within the aim."""
    kinds = {each.name for each in found if each.name.startswith("searched")}
    kinds -= {each.name for each in found if each.cost <= aim}
    return [min((each for each in found if each.name == name), key=lambda each: each.cost) for name in sorted(kinds)]


@dataclass(frozen=True, kw_only=True)
class Search(Step):
    """Picks the settings of its steps, place by place, so that the file that ships meets a budget at the least loss.

    Exactly one budget is given, as a share of the original's float file ("0.25x") or as an amount. Steps that train are
    run after the search as they stand; steps without choices are part of every candidate.

    Args:
        steps: in the order in which they are to run.
        latency: "0.25x" or "3ms".
        bytes: of the ONNX file, "0.1x" or "200000".
        macs: "0.5x" or "40000000".
        memory: of the process that runs the file, beyond the runtime's own, at its peak: "0.5x" or "30000000" bytes.
        runtime: where latency is measured; one that reads ONNX files: onnxruntime or openvino.
        threads, batch: for latency and memory.
        table: a latency table that was filled on another device, in place of this machine's own.
        images: how many calibration inputs judge a candidate; 0 for noise, where only the shares taken away count.
        widen: where the steps' ordinary choices do not reach the budget, take those that they keep back, such as
            channels that pass through residual additions.
    """

    family: ClassVar[str] = "search"
    summary: ClassVar[str] = "spends a budget of latency, bytes, multiply-adds or memory over the choices of its steps"
    serves: ClassVar[tuple[str, ...]] = ("what its steps serve",)

    steps: tuple[Step, ...] = ()
    latency: str | None = None
    bytes: str | int | None = None
    macs: str | int | None = None
    memory: str | int | None = None
    runtime: str = "onnxruntime"
    threads: int = 1
    batch: int = 1
    table: str | None = None
    images: int = 256
    widen: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "steps", tuple(self.steps))
        given = [name for name in _UNITS if getattr(self, name) is not None]
        if len(given) != 1:
            raise SettingsError(f"give one budget of latency, bytes, macs and memory, got {', '.join(given) or 'none'}")
        if not any(step.tunable for step in self.steps):
            raise SettingsError("a search needs a step with choices, such as drop_blocks or prune_channels")
        amount(given[0], str(getattr(self, given[0])))
        check_runtime(self.runtime)
        for name in ("threads", "batch"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def budget(self) -> tuple[str, float, bool]:
        """(what is spent, how much, whether that is a share of the original's)."""
        kind = next(name for name in _UNITS if getattr(self, name) is not None)
        return (kind, *amount(kind, str(getattr(self, kind))))

    def can_name(self, module: nn.Module) -> bool:
        return any(step.can_name(module) for step in self.steps if step.tunable)

    def data_needed(self) -> str:
        needs = {step.data_needed() for step in self.steps}
        return "labels" if "labels" in needs else "inputs" if "inputs" in needs else "nothing"

    def solve(self, model: nn.Module, task: Task) -> Found:
        """Finds the picks; leaves the model as it was.

        Raises:
            SettingsError: when no step can pick anything in this model, or the table serves another device or model.
        """
        started = time.monotonic()
        self.check_inputs(task)
        foresee_names((self,), model)
        say = _sayer(task.quiet)
        steps = tuple(dataclasses.replace(step, **_inside(self, step, model)) for step in self.steps)
        images = images_of(task, 2 * self.images) if self.images else None
        with working_folder() as folder, trying(), collected_once(), warnings.catch_warnings():
            warnings.simplefilter("ignore", InputWarning)  # said of the steps that are run in the end
            answers, note = self._all(steps, model, task, images, folder, say)
            answer, notes = answers[0], [note] if note else []
            ground, costs, original = answer.ground, answer.ground.costs, answer.ground.original
        notes += answer.way.notes
        if not answer.met:
            notes.append(_binding(ground, answer.best))
        said = {
            "target": {
                "kind": ground.budget.kind, "asked": ground.budget.asked, "budget": ground.limit,
                "unit": _UNITS[ground.budget.kind],
            },
            "original": original, "unchanged": costs.base, "picked": answer.to_json(answer.best),
            "proposals": [each.to_json(proposal) for each in answers for proposal in each.proposals],
            "checks": {"candidates": len(costs.checks), "error": costs.error, "fitted_error": costs.fitted_error},
            "met": answer.met, "note": "; ".join(notes),
            "places": len(ground.sites), "seconds": round(time.monotonic() - started, 1),
        }  # fmt: skip
        picks = {**answer.way.moved(answer.situation.picks, steps), **answer.best.picks}
        found = picked(ground.steps, picks)
        return Found(tuple(found), picks, answer.way.left_out, answer.met, said, answer.way.wider)

    def _all(
        self, steps: tuple[Step, ...], model: nn.Module, task: Task, images: Tensor | None, folder: Path, say: Any
    ) -> tuple[list[_Answer], str]:
        """(the answers of all situations, the best one first; what does not pay here, in words)."""
        found = situations(steps, model, task)
        table = self._budget().open_table() if self.budget[0] == "latency" else None
        made = itertools.count()
        grounds: list[Ground] = []

        def ground(way: Way, at: Task, whole: Ground | None) -> Ground:
            inner = folder / str(next(made))
            inner.mkdir()
            like = next((one for one in grounds if one.task is at and context(one.steps) == context(way.steps)), None)
            grounds.append(Ground(way.steps, model, at, self._budget(), table, inner, say, whole, like))
            return grounds[-1]

        whole = ground(Way(steps), task, None)
        ways, note = possible_ways(steps, whole, self.widen)
        if note:
            say(note)
        answers = []
        for number, situation in enumerate(found):
            if number:
                say(f"inputs of {situation.said}")
            for way, there in first_to_reach(ways, whole, situation, ground, say):
                answers.append(self._answer(there, way, situation, model, task, images, say))
                if answers[-1].met:
                    break
        return sorted(answers, key=lambda each: each.rank), note

    def _answer(
        self,
        ground: Ground,
        way: Way,
        situation: Situation,
        model: nn.Module,
        task: Task,
        images: Tensor | None,
        say: Any,
    ) -> _Answer:
        """Proposals for one ground, the best one confirmed; where it misses on its own, the aim is lowered."""
        own, folder = None if images is None else situation.inputs(images), cache_folder() / "sensitivities"
        judges = None if own is None else own[: self.images]
        losses = find_losses(ground.steps, ground.sites, model, situation.task, judges, folder, say)
        aim, scale = ground.aim, 1.0
        proposals: list[Proposal] = []
        for _ in range(_CONFIRMATIONS):
            proposals, best = _answers(ground, losses, aim, known=proposals)
            compare(proposals, ground.steps, model, situation.task, own, ground.sites, losses, folder, images)
            if images is None:  # of every place the same share is gone
                for each in proposals:
                    each.loss = (each.loss or 0.0) + situation.shrunk(task) ** 2 * len(ground.sites)
            fits = best.cost <= aim
            if fits:
                best = min((each for each in proposals if each.cost <= aim), key=lambda each: each.loss or 0.0)
            # What files take on their own, against what they took among others, is the same for like answers.
            timed, predicted = best.cost, best.predicted * scale
            best = dataclasses.replace(best, predicted=predicted, cost=ground.confirmed(best))
            scale = best.cost / timed
            if best.cost <= ground.limit or not fits:
                break
            aim *= ground.aim / best.cost
        return _Answer(ground, way, situation, best, proposals)

    def _budget(self) -> Budget:
        kind, value, is_share = self.budget
        asked = str(getattr(self, kind))
        return Budget(kind, asked, value, is_share, self.runtime, self.threads, self.batch, self.table)

    def fill(self, model: nn.Module, task: Task) -> tuple[Table, Costs, float]:
        """(the latency table with all that this model can ask for, its costs, the seconds it took)."""
        started = time.monotonic()
        self.check_inputs(task)
        table = self._budget().open_table()
        with working_folder() as folder:
            say, budget = _sayer(task.quiet), self._budget()
            (folder / "whole").mkdir()
            (folder / "float").mkdir()
            ground = Ground(self.steps, model, task, budget, table, folder / "whole", say)
            costs = ground.costs
            ways, _ = possible_ways(self.steps, ground, widen=False)
            if ways[0].left_out:  # a search here will want the float entries too
                costs = Ground(ways[0].steps, model, task, budget, table, folder / "float", say, ground).costs
        return table, costs, round(time.monotonic() - started, 1)

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """{"picks": what was picked, "plan": the steps' plans}; runs the search, and the steps on a copy."""
        model = opened(copied(model), task.example)
        try:
            found = self.solve(model, task)
        except NoChoice:
            return {}
        return self._plan(found, Chain(steps=found.steps).plan(model, task))

    def _plan(self, found: Found, inner: Plan) -> Plan:
        picks = {str(index): places for index, places in found.picks.items()}
        plan = {"picks": picks, "left_out": list(found.left_out), "plan": inner}
        return ({**plan, "wider": True} if found.wider else plan) if inner else {}

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        if not plan:
            return model
        return Chain(steps=self._replayed(plan)).apply(model, plan["plan"])

    def task_after(self, task: Task, plan: Plan) -> Task:
        return Chain(steps=self._replayed(plan)).task_after(task, plan["plan"]) if plan else task

    def _replayed(self, plan: Plan) -> tuple[Step, ...]:
        """The steps that a plan was made with."""
        picks = {int(index): places for index, places in plan["picks"].items()}
        steps = without(self.steps, plan["left_out"])
        if plan.get("wider"):
            steps = tuple(step.wider() or step for step in steps)
        return tuple(picked(steps, picks))

    def run(self, model: nn.Module, task: Task) -> tuple[nn.Module, Plan]:
        """Where nothing can be picked, the model stays as it is and `NoEffect` is warned of."""
        model = opened(model, task.example)
        try:
            found = self.solve(model, task)
        except NoChoice as error:
            warnings.warn(str(error), NoEffect, stacklevel=2)
            return model, {}
        model, inner = Chain(steps=found.steps).run(model, task)
        return model, self._plan(found, inner)


def amount(kind: str, text: str) -> tuple[float, bool]:
    """ "0.25x" -> (0.25, True); "3ms" -> (3.0, False). Raises SettingsError."""
    unit = "ms" if kind == "latency" else ""
    is_share = text.endswith("x")
    try:
        value = float(text.removesuffix("x") if is_share else text.removesuffix(unit) if unit else text)
    except ValueError:
        value = -1.0
    least = 0.0 if unit or is_share else 1.0  # half a byte is a forgotten x
    wrong_unit = bool(unit) and not is_share and not text.endswith(unit)
    if not math.isfinite(value) or value <= 0 or value < least or (is_share and value > 1) or wrong_unit:
        plain = "3ms" if unit else "200000"
        raise SettingsError(f"{kind} must be a share such as 0.5x, or an amount such as {plain}, got {text!r}")
    return value, is_share


def picked(steps: tuple[Step, ...], picks: Picks) -> list[Step]:
    """The steps of a search with what was picked: a recipe."""
    return configured(steps, {index: picks.get(index, {}) for index, step in enumerate(steps) if step.tunable})


def _inside(search: Search, step: Step, model: nn.Module) -> dict[str, Any]:
    """`only` and `skip` of the search hold for its steps with choices: those of the patterns that can be about what the
    step changes, since blocks are no layers."""
    if not step.tunable or not (search.only or search.skip):
        return {}

    def about(pattern: str) -> bool:
        return any(hits(pattern, path, module) and step.can_name(module) for path, module in model.named_modules())

    skip = (*step.skip, *(pattern for pattern in search.skip if about(pattern)))
    # Where none is about its places, the step has no choice: all are kept, so that it takes none.
    return {"only": step.only or tuple(filter(about, search.only)) or search.only, "skip": skip}


def _sayer(quiet: bool) -> Any:
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet, highlight=False)
    return lambda text: console.print(f"    {text}", soft_wrap=True)


def _binding(ground: Ground, best: Proposal) -> str:
    """Which limit stands in the way, in words."""
    sites, unit = ground.sites, _UNITS[ground.budget.kind]
    left = [site for site in sites if best.picks.get(site.step, {}).get(site.place) != site.settings[-1]]
    what = "every choice is used up" if not left else f"{len(left)} of {len(sites)} places could give no more"
    return (
        f"the least that was found is {best.cost:.4g} {unit}, {100 * (best.cost / ground.limit - 1):.0f} % above the "
        f"budget of {ground.limit:.4g}; {what}, and what no step can change costs the rest"
    )
