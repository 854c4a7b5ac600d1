"""From a target ("a quarter of the latency") to the recipe that aims at it, and whether it was met.

A target is a share of the original's or an amount. Latency, bytes and memory are spent by a search, multiply-adds by
the same share of the channels everywhere. What follows is the same: recovery with the original as teacher, folded
norms, int8.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tersenet.atomic import writing
from tersenet.errors import RecipeError, RunError, SettingsError
from tersenet.recipe import Recipe
from tersenet.report.headline import float_file_bytes, smallest_bytes
from tersenet.report.report import target
from tersenet.search.search import Search, amount
from tersenet.step import Step
from tersenet.task import Task

_KINDS = ("latency", "bytes", "macs", "memory")


@dataclass(frozen=True)
class Target:
    """What to aim at; at most one is given.

    Args:
        latency: "0.25x" of the original's float ONNX file on the same runtime, threads and batch, or "3ms".
        bytes: "0.1x" of that file, or "200000"; judged on the .terse file.
        macs: "0.5x" by the same share of the channels everywhere, or "40000000" by a search.
        memory: "0.5x" of the memory that running that file takes at its peak, or "30000000" bytes.
    """

    latency: str | None = None
    bytes: str | None = None
    macs: str | None = None
    memory: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) > 1:
            raise SettingsError(f"give one target, got {' and '.join(given)}; a recipe can hold several searches")
        for name in given:
            amount(name, str(getattr(self, name)))

    @property
    def given(self) -> bool:
        return any(getattr(self, name) is not None for name in _KINDS)


NO_TARGET = Target()


def recipe_of(
    path: Path | str | None = None,
    target: Target = NO_TARGET,
    *,
    epochs: int = 6,
    data: str = "",
    runtime: str = "onnxruntime",
    threads: int = 1,
    batch: int = 1,
    table: Path | str | None = None,
    device: str = "auto",
    max_hours: float | None = None,
    resolutions: Sequence[str] = (),
) -> Recipe:
    """The recipe of a file, or the one that aims at a target.

    Args:
        epochs: of recovery; on random data nothing is trained.
        data: as typed, to know random data.
        runtime, threads, batch, table: for a latency target.
        device, max_hours: for the training of a target.
        resolutions: sizes of inputs that a target may take in place of the network's own.
    Raises:
        SettingsError: when both or neither are given.
    """
    if (path is None) == (not target.given):
        raise SettingsError(
            "give either a recipe (--recipe FILE) or a target "
            "(--latency 0.5x, --bytes 0.1x, --macs 0.5x, --memory 0.5x)"
        )
    if path is not None:
        if resolutions:
            raise SettingsError(
                "--resolutions are choices of a target; in a recipe, write a resize step into its search"
            )
        return Recipe.read(path)
    noise = data.startswith("random:")
    where = {"accelerator": device, "max_hours": max_hours}
    if target.macs is not None and amount("macs", target.macs)[1] and not resolutions:
        return _cut_to(share(target.macs), 0 if noise else epochs, where)
    steps = _choices(tuple(resolutions), 0 if noise else epochs, noise, where)
    return Recipe(
        (
            Search(
                steps=steps, latency=target.latency, bytes=target.bytes, macs=target.macs, memory=target.memory,
                runtime=runtime, threads=threads, batch=batch,
                table=None if table is None else str(table), images=0 if noise else 256,
            ),
        )
    )  # fmt: skip


def _cut_to(macs: float, epochs: int, where: dict[str, Any]) -> Recipe:
    """What reaches a share of the multiply-adds without a search."""
    from tersenet.distill.soft_targets import SoftTargets
    from tersenet.pruning.prune_channels import PruneChannels
    from tersenet.quantization.quantize import Quantize
    from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
    from tersenet.train import Train

    # A margin, because int8 replaces parameter-free shortcuts by small convolutions, which count.
    cut = PruneChannels(macs=round(0.985 * macs, 4))
    recovery = (Train(epochs=epochs, companions=(SoftTargets(),), **where),) if epochs else ()
    return Recipe((cut, *recovery, FoldBatchNorm(), Quantize()))


def _choices(sizes: tuple[str, ...], epochs: int, noise: bool, where: dict[str, Any]) -> tuple[Step, ...]:
    """The steps that a target searches over, and the training that mends what they did."""
    from tersenet.distill.soft_targets import SoftTargets
    from tersenet.pruning.drop_blocks import DropBlocks
    from tersenet.pruning.prune_channels import PruneChannels
    from tersenet.quantization.quantize import Quantize
    from tersenet.resize import Resize
    from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
    from tersenet.train import Train

    # A high rate, because whole blocks are gone: what is left has to find another solution, not the old one again.
    recovery = (
        Train(epochs=epochs, learning_rate=0.05, warmup=0.02, precision="auto", companions=(SoftTargets(),), **where),
    )
    return (
        *((Resize(sizes=sizes),) if sizes else ()),
        DropBlocks(refit=not noise),
        PruneChannels(importance="l2" if noise else "reconstruction", refit=not noise),
        *(recovery if epochs else ()),
        FoldBatchNorm(),
        Quantize(),
    )


def share(text: str | float) -> float:
    """ "0.5x" -> 0.5. Raises SettingsError outside (0, 1]."""
    try:
        value = float(str(text).removesuffix("x"))
    except ValueError:
        raise SettingsError(f"{text!r} is no share; give the part to keep, such as 0.5x") from None
    if not 0 < value <= 1:
        raise SettingsError(f"the share to keep must be in (0, 1], got {text}; 0.5x keeps half")
    return value


def aim_of(steps: Sequence[Step]) -> Target:
    """The target of a recipe that begins with a search."""
    if steps and isinstance(steps[0], Search):
        search = steps[0]
        values = {name: getattr(search, name) for name in _KINDS}
        return Target(**{name: None if value is None else str(value) for name, value in values.items()})
    return NO_TARGET


def searched(
    steps: Sequence[Step], model: nn.Module, task: Task, out: Path | None
) -> tuple[tuple[Step, ...], dict[str, Any] | None]:
    """The steps with a leading search replaced by what it finds, and what it says of itself.

    Args:
        out: the run folder; a search that it holds is not repeated.
    """
    if not steps or not isinstance(steps[0], Search):
        return tuple(steps), None
    search = steps[0]
    asked = Recipe((search,)).dump()
    kept = None if out is None else out / "search.json"
    if kept is not None and kept.exists():
        try:
            was = json.loads(kept.read_text(encoding="utf-8"))
            before, said, recipe = was["asked"], was["said"], Recipe.parse(was["recipe"])
        except (OSError, ValueError, KeyError, TypeError, RecipeError) as error:
            raise RunError(f"{kept} is damaged and cannot be read ({error}); delete {out} to start anew") from error
        if before != asked:
            raise RunError(f"{out} holds a run with another target; choose another folder with --out, or delete it")
        return (*recipe.steps, *steps[1:]), said
    for step in steps:
        step.check(task)
    found = search.solve(model, task)
    said = {"asked": asked, "recipe": Recipe(found.steps).dump(), "said": found.said}
    return (*found.steps, *steps[1:]), said


def keep_search(said: dict[str, Any] | None, out: Path) -> dict[str, Any] | None:
    """Writes a fresh search into the run folder; what it says of itself."""
    if said is None or "recipe" not in said:
        return said
    with writing(out / "search.json") as temporary:
        temporary.write_text(json.dumps(said, indent=1), encoding="utf-8")
    return said["said"]


def judged(wanted: Target, rows: Sequence[dict[str, Any]], runtime: str) -> list[dict[str, Any]]:
    """What was aimed at and what the files that ship got, as targets of the report."""
    first, last = rows[0], rows[-1]
    found = []
    if wanted.macs is not None:
        value, is_share = amount("macs", wanted.macs)
        got = last["macs"] / first["macs"] if is_share else last["macs"]
        found.append(target("macs", wanted.macs, _said(got, value, "x") if is_share else f"{got}", got <= value))
    if wanted.latency is not None:
        value, is_share = amount("latency", wanted.latency)
        after, before = (row["latency_ms"][runtime]["median"] for row in (last, first))
        got = after / before if is_share else after
        found.append(target("latency", wanted.latency, _said(got, value, "x" if is_share else "ms"), got <= value))
    if wanted.memory is not None and runtime in last.get("peak_bytes", {}):  # else it cannot be measured here
        value, is_share = amount("memory", wanted.memory)
        peak, before = last["peak_bytes"][runtime], first["peak_bytes"][runtime]
        got = peak / before if is_share else peak
        found.append(target("memory", wanted.memory, _said(got, value, "x") if is_share else f"{got}", got <= value))
    if wanted.bytes is not None:
        value, is_share = amount("bytes", wanted.bytes)
        size, before = smallest_bytes(last)[1], float_file_bytes({"rows": rows})[1]  # type: ignore[index]
        got = size / before if is_share else size
        found.append(target("bytes", wanted.bytes, _said(got, value, "x") if is_share else f"{got}", got <= value))
    return found


def _said(got: float, wanted: float, unit: str) -> str:
    return f"{missed_digits(got, wanted, 3)}{unit}"


def missed_digits(got: float, wanted: float, digits: int) -> str:
    """A figure with so many decimals, and more where these would hide that it is above what was wanted.

    >>> missed_digits(0.12502, 0.125, 3), missed_digits(0.1, 0.125, 3), missed_digits(0.13, 0.125, 3)
    ('0.12502', '0.100', '0.130')
    """
    while digits < 15 and got > wanted >= float(f"{got:.{digits}f}"):
        digits += 1
    return f"{got:.{digits}f}"
