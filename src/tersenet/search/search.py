"""`Search`: one budget of latency, bytes, multiply-adds or memory, spent over the choices of several steps.

What a pick saves is measured in the runtime (table.py, costs.py), what it hurts is the divergence that it causes alone
(sensitivity.py), the picks come from an integer program (solver.py), and the best few are timed and compared for real
(proposals.py). The steps themselves are known only by their contract.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from tersenet.cache import cache_folder
from tersenet.errors import NoEffect, SettingsError
from tersenet.search.bench import Bench, check_runtime, device_of, images_of, working_folder
from tersenet.search.correction import corrected
from tersenet.search.costs import Costs, exact_costs, latency_costs
from tersenet.search.proposals import Proposal, cheapest, compare, propose
from tersenet.search.sensitivity import Losses, find_losses
from tersenet.search.sites import Picks, Site, configured, context, describe, find_sites, fingerprint, picks_key
from tersenet.search.table import Table
from tersenet.step import Chain, Plan, Step
from tersenet.task import Task

# A latency is measured again on the file that ships, and no two measurements are equal.
_MARGIN = 0.015
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
    """

    steps: tuple[Step, ...]
    picks: Picks
    left_out: tuple[str, ...]
    met: bool
    said: dict[str, Any] = field(repr=False)


class NoChoice(SettingsError):
    """There is nothing to pick."""


@dataclass(frozen=True)
class _Ground:
    """What a search stands on: what can be picked, what it costs, the budget in the same unit; for a latency the table,
    and the network's key in it."""

    sites: list[Site]
    bench: Bench
    costs: Costs
    budget: float
    original: float
    kind: str
    table: Table | None
    network: str = ""

    def not_paying(self, steps: tuple[Step, ...]) -> tuple[str, ...]:
        """Names of the steps that quantize, where what they make is slower than the float file."""
        rounding = tuple(step.name for step in steps if step.family == "quantize")
        return rounding if self.kind == "latency" and self.costs.base >= self.original else ()

    def measured(self, candidates: list[Picks]) -> list[float]:
        """The real costs of some picks, timed once; predicted ones where the table is another device's."""
        if self.table is None:
            return [self.bench.weight(picks, self.kind) for picks in candidates]
        if self.table.frozen:
            return [self.costs.predict(picks, self.sites) for picks in candidates]
        known = self.table.networks[self.network].setdefault("timed", {})
        new = [picks for picks in candidates if picks_key(picks) not in known]
        for picks, (_, share) in zip(new, self.bench.times(new, "timing the best"), strict=True):
            known[picks_key(picks)] = self.costs.base * share
        self.table.write()
        return [known[picks_key(picks)] for picks in candidates]

    def confirmed(self, answer: Proposal) -> float:
        """The cost of an answer; a latency is measured once more, beside the float file and as files that ship are:
        each in a process of its own, which can differ from what was timed among other candidates in one process."""
        if self.table is None or self.table.frozen:
            return answer.cost
        known = self.table.networks[self.network].setdefault("confirmed", {})
        key = picks_key(answer.picks)
        if key not in known:
            known[key] = self.original * self.bench.share_of_float(answer.picks)
            self.table.write()
        return known[key]


def _answers(
    ground: _Ground, losses: Losses, aim: float, known: list[Proposal]
) -> tuple[list[Proposal], Proposal, bool]:
    """(all answers so far, the cheapest of them, whether any is within the aim); where none is, what costs least
    whatever it hurts is among them."""
    sites, costs = ground.sites, ground.costs
    found = list(known)
    for each in propose(sites, costs, losses, aim, ground.measured):
        if all(each.picks != other.picks for other in found):
            found.append(each)
    if not any(each.cost <= aim for each in found):
        learned = corrected(costs, sites, [*costs.seen, *((each.picks, each.cost) for each in found)])
        picks = cheapest(sites, learned)
        found.append(Proposal("cheapest", picks, learned.predict(picks, sites), ground.measured([picks])[0]))
    least = min(found, key=lambda each: each.cost)
    return found, least, least.cost <= aim


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

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "steps", tuple(self.steps))
        given = [name for name in _UNITS if getattr(self, name) is not None]
        if len(given) != 1:
            raise SettingsError(f"give one budget of latency, bytes, macs and memory, got {', '.join(given) or 'none'}")
        if not any(tunable(step) for step in self.steps):
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

    def data_needed(self) -> str:
        needs = {step.data_needed() for step in self.steps}
        return "labels" if "labels" in needs else "inputs" if "inputs" in needs else "nothing"

    def solve(self, model: nn.Module, task: Task) -> Found:
        """Finds the picks; leaves the model as it was.

        Raises:
            SettingsError: when no step can pick anything in this model, or the table serves another device or model.
        """
        started = time.monotonic()
        say = _sayer(task.quiet)
        steps = tuple(dataclasses.replace(step, **_inside(self, step)) for step in self.steps)
        images = images_of(task, 2 * self.images) if self.images else None
        kind, notes = self.budget[0], []
        left_out: tuple[str, ...] = ()
        with working_folder() as folder:
            ground = self._ground(steps, model, task, folder, say)
            left_out = ground.not_paying(steps)
            if left_out:
                slower = ground.costs.base / ground.original
                notes.append(f"{', '.join(left_out)} makes the network {slower:.2f}x slower than float here: left out")
                say(notes[-1])
                steps = without(steps, left_out)
                ground = self._ground(steps, model, task, folder, say)
            sites, costs, budget = ground.sites, ground.costs, ground.budget
            judges = None if images is None else images[: self.images]
            losses = find_losses(steps, sites, model, task, judges, cache_folder() / "sensitivities", say)
            aim = budget * (1 - _MARGIN) if kind == "latency" else budget
            proposals: list[Proposal] = []
            for _ in range(_CONFIRMATIONS):
                proposals, best, fits = _answers(ground, losses, aim, known=proposals)
                compare(proposals, steps, model, task, images, sites, losses, cache_folder() / "sensitivities")
                if fits:
                    best = min((each for each in proposals if each.cost <= aim), key=lambda each: each.loss or 0.0)
                best = dataclasses.replace(best, cost=ground.confirmed(best))
                if best.cost <= budget or not fits:
                    break
                aim *= budget * (1 - _MARGIN) / best.cost
            if best.cost > budget:
                notes.append(_binding(sites, best, budget, kind))
        said = {
            "target": {"kind": kind, "asked": getattr(self, kind), "budget": budget, "unit": _UNITS[kind]},
            "original": ground.original, "unchanged": costs.base, "picked": best.to_json(steps),
            "proposals": [each.to_json(steps) for each in proposals],
            "checks": {"candidates": len(costs.checks), "error": costs.error, "fitted_error": costs.fitted_error},
            "met": best.cost <= budget, "note": "; ".join(notes),
            "places": len(sites), "seconds": round(time.monotonic() - started, 1),
        }  # fmt: skip
        return Found(tuple(picked(steps, best.picks)), best.picks, left_out, best.cost <= budget, said)

    def _ground(self, steps: tuple[Step, ...], model: nn.Module, task: Task, folder: Path, say: Any) -> _Ground:
        """What can be picked and what it costs."""
        sites = find_sites(steps, model, task)
        if not sites:
            raise NoChoice("no step of the search has a choice in this model; use a recipe instead of a target")
        say(f"{len(sites)} places with {sum(len(site.settings) for site in sites)} settings")
        bench = Bench(
            steps, sites, model, task, runtime=self.runtime, threads=self.threads, batch=self.batch, folder=folder,
            progress=not task.quiet,
        )  # fmt: skip
        unable = [site for site in sites if not bench.able(site)]
        if unable:
            sites = [site for site in sites if site not in unable]
            say(f"{len(unable)} places cannot be timed by changing a file, such as {unable[0].place}: left as they are")
        if not sites:
            raise NoChoice("no choice of the search can be timed by changing a file; use a recipe instead of a target")
        kind, value, is_share = self.budget
        if kind != "latency":
            costs, network = exact_costs(bench, sites, kind), ""
            original = costs.base if kind == "macs" else bench.weight_of_original(kind)
            table = None
        else:
            table = self._table()
            network = fingerprint(describe(model, task.example), sites, context(steps))
            costs = latency_costs(bench, sites, table, network)
            original = float(table.networks[network]["float_ms"])
        return _Ground(sites, bench, costs, value * original if is_share else value, original, kind, table, network)

    def _table(self) -> Table:
        """This device's table, or the one that was given."""
        if self.table is None:
            return Table.open(device_of(self.runtime, self.threads, self.batch))
        table = Table.read(self.table)
        table.frozen = True
        wanted = (self.runtime, self.threads, self.batch)
        was = tuple(table.device.get(key) for key in ("runtime", "threads", "batch"))
        if was != wanted:
            raise SettingsError(
                f"the table {self.table} is of {was[0]} with {was[1]} threads and batch {was[2]}, the search of "
                f"{wanted[0]}, {wanted[1]} and {wanted[2]}; give the same"
            )
        return table

    def fill(self, model: nn.Module, task: Task) -> tuple[Table, Costs, float]:
        """(the latency table with all that this model can ask for, its costs, the seconds it took)."""
        started = time.monotonic()
        with working_folder() as folder:
            ground = self._ground(self.steps, model, task, folder, _sayer(task.quiet))
            left_out = ground.not_paying(self.steps)
            if left_out:  # a search here will want the float entries too
                ground = self._ground(without(self.steps, left_out), model, task, folder, _sayer(task.quiet))
        assert ground.table is not None, "only a latency has a table"
        return ground.table, ground.costs, round(time.monotonic() - started, 1)

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """{"picks": what was picked, "plan": the steps' plans}; runs the search, and the steps on a copy."""
        try:
            found = self.solve(model, task)
        except NoChoice:
            return {}
        return self._plan(found, Chain(steps=found.steps).plan(model, task))

    def _plan(self, found: Found, inner: Plan) -> Plan:
        picks = {str(index): places for index, places in found.picks.items()}
        return {"picks": picks, "left_out": list(found.left_out), "plan": inner} if inner else {}

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        if not plan:
            return model
        picks = {int(index): places for index, places in plan["picks"].items()}
        steps = picked(without(self.steps, plan["left_out"]), picks)
        return Chain(steps=tuple(steps)).apply(model, plan["plan"])

    def run(self, model: nn.Module, task: Task) -> tuple[nn.Module, Plan]:
        """Where nothing can be picked, the model stays as it is and `NoEffect` is warned of."""
        try:
            found = self.solve(model, task)
        except NoChoice as error:
            warnings.warn(str(error), NoEffect, stacklevel=2)
            return model, {}
        model, inner = Chain(steps=found.steps).run(model, task)
        return model, self._plan(found, inner)


def without(steps: tuple[Step, ...], names: Collection[str]) -> tuple[Step, ...]:
    """The steps but those of some names."""
    return tuple(step for step in steps if step.name not in names)


def tunable(step: Step) -> bool:
    """Whether a step has choices at all."""
    return type(step).choices is not Step.choices


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
    return configured(steps, {index: picks.get(index, {}) for index, step in enumerate(steps) if tunable(step)})


def _inside(search: Search, step: Step) -> dict[str, Any]:
    """`only` and `skip` of the search hold for its steps with choices."""
    if not tunable(step) or not (search.only or search.skip):
        return {}
    return {"only": step.only or search.only, "skip": (*step.skip, *search.skip)}


def _sayer(quiet: bool) -> Any:
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet, highlight=False)
    return lambda text: console.print(f"    {text}", soft_wrap=True)


def _binding(sites: list[Site], best: Proposal, budget: float, kind: str) -> str:
    """Which limit stands in the way, in words."""
    left = [site for site in sites if best.picks.get(site.step, {}).get(site.place) != site.settings[-1]]
    what = "every choice is used up" if not left else f"{len(left)} of {len(sites)} places could give no more"
    return (
        f"the least that was found is {best.cost:.4g} {_UNITS[kind]}, {100 * (best.cost / budget - 1):.0f} % above the "
        f"budget of {budget:.4g}; {what}, and what no step can change costs the rest"
    )
