"""What to do with a finished run: which file to deploy and how to load it, what each step bought, and what to try.

All of it follows from what was measured. A file is called faster, and a score worse, only where the intervals say so.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import yaml

from tersenet.numerics.scale import ACCURACY, Scale
from tersenet.report.headline import (
    Change,
    deployed,
    drop,
    first_runtime,
    latency_change,
    read_by,
    size_change,
    surely_worse,
)
from tersenet.report.snippets import snippet
from tersenet.report.words import bytes_text, factor_text, milliseconds_text, runtime_name

Row = dict[str, Any]
# Below this share of what is left, more of the same is rarely worth its loss.
_HALF = 0.5


@dataclass(frozen=True)
class Deploy:
    """The file to deploy.

    Args:
        file: its path in the run folder.
        runtime: to run it in; None where no latency was measured.
        why: what was measured of it, in words.
        code: the lines of Python that load and run it there.
        predicts: whether it gives classes of images, which `tersenet predict` shows.
    """

    file: str
    runtime: str | None
    why: str
    code: str | None
    predicts: bool = False


def deploy(report: dict[str, Any]) -> Deploy | None:
    """Which file to deploy, in which runtime; None where the run left no file that can be run.

    That of the last row in the surely fastest runtime, else in the first one. Another row's where it is surely faster
    there and its score is not below.
    """
    rows, last = report["rows"], report["rows"][-1]
    runtime = fastest_runtime(report)
    kind = read_by(runtime) if runtime else deployed(report)
    if kind is None or not last.get("file_bytes", {}).get(kind):
        return None
    better = _better(report, runtime)
    index = len(rows) - 1 if better is None else better
    name = f"model.{kind}" if better is None else _path(rows[index], index, kind)
    said = [_measured(report, rows[index], runtime, kind)]
    if better is not None:
        said.append("it is faster than the result and scores no less")
    elif runtime and runtime != first_runtime(report):
        said.append(f"{runtime_name(runtime)} is the fastest of the runtimes that were measured")
    entry = report["files"].get(f"model.{kind}", {})
    preparation, scale = report.get("preparation") or {}, Scale.of(report)
    code = snippet(name, runtime, preparation, entry, scale)
    predicts = scale.name == ACCURACY.name and bool(preparation) and not preparation.get("inputs")
    return Deploy(name, runtime, "; ".join(said), code, predicts)


def fastest_runtime(report: dict[str, Any]) -> str | None:
    """The runtime in which what ships is surely faster than in every other, else the first one."""
    first, latencies = first_runtime(report), report["rows"][-1].get("latency_ms", {})
    for name, latency in latencies.items():
        others = [other for key, other in latencies.items() if key != name]
        if others and all(latency["high"] < other["low"] and _comparable(latency, other) for other in others):
            return name
    return first


def _comparable(latency: Row, other: Row) -> bool:
    return all(latency.get(key) == other.get(key) for key in ("threads", "batch"))


def _better(report: dict[str, Any], runtime: str | None) -> int | None:
    """The fastest row before the last that is surely faster than it and does not score worse."""
    rows, scale = report["rows"], Scale.of(report)
    last = rows[-1]
    found = []
    for index, row in enumerate(rows[:-1]):
        change = between(last, row, runtime)
        scored = row.get("score") is not None and last.get("score") is not None
        if change and change.shrank and (not scored or scale.lost(last["score"], row["score"]) <= 0):
            found.append((change.after, index))
    return min(found)[1] if found else None


def between(before: Row, after: Row, runtime: str | None) -> Change | None:
    """The latencies of two rows, with the widest interval that theirs allow."""
    was, now = before.get("latency_ms", {}).get(runtime), after.get("latency_ms", {}).get(runtime)
    if not was or not now or not was["median"] or not now["median"] or not _comparable(was, now):
        return None
    low, high = now["low"] / max(was["high"], 1e-12), now["high"] / max(was["low"], 1e-12)
    return Change(was["median"], now["median"], low, high)


def _path(row: Row, index: int, kind: str) -> str:
    """Where a run keeps the file of a row that is not the last: files/02-train.onnx of "2. train"."""
    return f"files/{index:02d}-{re.sub(r'^[0-9]+[.] ', '', row['step'])}.{kind}"


def _measured(report: dict[str, Any], row: Row, runtime: str | None, kind: str) -> str:
    """ "0.0315 ms (2.4x faster), 43.2 KiB (6.8x smaller), accuracy 98.89 %" """
    said, scale, first = [], Scale.of(report), row is report["rows"][0]
    if latency := row.get("latency_ms", {}).get(runtime):
        change = None if first else latency_change(report, row, runtime)
        said.append(milliseconds_text(latency["median"]) + _gain(change, "faster"))
    if size := row.get("file_bytes", {}).get(kind):
        change = None if first else size_change(report, row, kind)
        said.append(bytes_text(size) + _gain(change, "smaller"))
    score = (row.get("scores") or {}).get(runtime, row.get("score"))
    return ", ".join([*said, *([f"{scale.name} {scale.text(score)}"] if score is not None else [])])


def _gain(change: Change | None, word: str) -> str:
    if change is None:
        return ""
    other = {"faster": "slower", "smaller": "larger"}[word]
    if change.shrank:
        return f" ({factor_text(change.factor)} {word})"
    return f" ({factor_text(change.left)} {other})" if change.grew else f" (not {word})"


def bought(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What each step bought against the row before it: {"step", "bytes", "time", "score"}, the last three each (text,
    mood); mood is "good", "bad" or "even"."""
    kind, runtime, scale = deployed(report), first_runtime(report), Scale.of(report)
    found = []
    for before, after in itertools.pairwise(report["rows"]):
        sizes = [row.get("file_bytes", {}).get(kind) for row in (before, after)]
        size = Change(*sizes) if all(sizes) else None
        found.append(
            {
                "step": after["step"],
                "bytes": _effect(size, "smaller", "larger", "same size"),
                "time": _effect(between(before, after, runtime), "faster", "slower", "no sure change"),
                "score": _points(before, after, scale),
            }
        )
    return found


def _effect(change: Change | None, good: str, bad: str, even: str) -> tuple[str, str]:
    if change is None:
        return "-", "even"
    if change.shrank and change.left < 0.995:
        return f"{factor_text(change.factor)} {good}", "good"
    return (f"{factor_text(change.left)} {bad}", "bad") if change.grew else (even, "even")


def _points(before: Row, after: Row, scale: Scale) -> tuple[str, str]:
    if before.get("score") is None or after.get("score") is None:
        return "-", "even"
    lost = scale.lost(before["score"], after["score"])
    if scale.same(before["score"], after["score"]):
        return "no change", "even"
    return (f"{scale.loss_text(lost)} lost", "bad") if lost > 0 else (f"{scale.loss_text(-lost)} gained", "good")


@dataclass(frozen=True)
class Advice:
    """What to try next: for "less loss" or for "more gain", each a sentence."""

    aim: str
    said: list[str]


def advice(report: dict[str, Any]) -> Advice | None:
    """What to try: less loss where the loss is more than half of what was allowed, or sure where nothing was said of
    that; else more gain. None of a run of no steps."""
    if len(report["rows"]) < 2:
        return None
    steps, allowed = _recipe(report), report["settings"].get("max_drop")
    lost = drop(report, report["rows"][-1])
    if lost is not None and lost > 0:
        much = surely_worse(report, report["rows"][-1]) if allowed is None else lost > _HALF * allowed
        if much:
            return Advice("less loss", _less_loss(report, steps))
    return Advice("more gain", _more_gain(report, steps))


def _aim(report: dict[str, Any]) -> tuple[str, float] | None:
    """The share that was aimed at, such as ("latency", 0.25); None where the run had a recipe or aimed at an amount."""
    for kind in ("latency", "bytes", "macs", "memory"):
        asked = re.fullmatch(r"([0-9.]+)x", str(report["settings"].get(kind, "")))
        if asked:
            return kind, float(asked[1])
    return None


def _recipe(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, settings) of each step; the names alone where there is no recipe that says the same steps."""
    names = [re.sub(r"^[0-9]+[.] ", "", row["step"]) for row in report["rows"][1:]]
    try:
        listed = yaml.safe_load(report.get("recipe") or "")["steps"]
        pairs = [next(iter(each.items())) if isinstance(each, dict) else (each, {}) for each in listed]
    except (yaml.YAMLError, TypeError, KeyError, StopIteration, AttributeError):
        pairs = []
    if [name for name, _ in pairs] != names:
        return [(name, {}) for name in names]
    return [(name, settings or {}) for name, settings in pairs]


def _less_loss(report: dict[str, Any], steps: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """On the step that cost most, together with the training behind it."""
    rows, scale = report["rows"], Scale.of(report)
    costs: list[tuple[float, int]] = []
    for index, (name, _) in enumerate(steps):
        before, after = rows[index].get("score"), rows[index + 1].get("score")
        lost = 0.0 if before is None or after is None else scale.lost(before, after)
        if name == "train" and costs and lost <= 0:
            costs[-1] = (costs[-1][0] + lost, costs[-1][1])
        else:
            costs.append((lost, index))
    cost, worst = max(costs, key=lambda each: each[0])
    name, settings = steps[worst]
    trained = next((more for other, more in steps[worst + 1 :] if other == "train"), None)
    said = [f"{rows[worst + 1]['step']} cost {scale.loss_text(cost)}" + (" after its training" if trained else "")]
    if aim := _aim(report):
        said.append(f"a looser target: --{aim[0]} {_share(min(1.0, 1.3 * aim[1]))} in place of {_share(aim[1])}")
    else:
        said += _WEAKER[name](settings) if name in _WEAKER else [f"weaken {name}, or leave it out"]
    if name not in ("train", "fold_batch_norm") and trained is None:
        said.append("train behind it, with the original as teacher: - train: {epochs: 10, with: [{soft_targets: {}}]}")
    elif trained and trained.get("epochs"):
        said.append(f"train longer: epochs: {2 * trained['epochs']} in place of {trained['epochs']}")
    return said


def _less_pruned(settings: Mapping[str, Any]) -> list[str]:
    if settings.get("macs"):
        return [f"keep more: macs: {round((1 + settings['macs']) / 2, 2):g} in place of {settings['macs']:g}"]
    sparsity = settings.get("sparsity")
    less = [f"prune less: sparsity: {round(0.6 * sparsity, 2):g} in place of {sparsity:g}"] if sparsity else []
    return less + (["reconstruct the layers: refit: true"] if settings.get("refit") is False else [])


def _rounded_better(settings: Mapping[str, Any]) -> list[str]:
    said = []
    rounding = settings.get("rounding", "auto")
    if rounding == "nearest" or (rounding == "auto" and settings.get("weights", "int8") == "int8"):
        said.append("choose the rounding by its error: quantize: {rounding: repaired, correct_bias: true}")
    bits = re.fullmatch(r"int([2-7])", str(settings.get("weights")))
    if bits:
        said.append(f"more bits: weights: int{min(8, int(bits[1]) + 2)} in place of {settings['weights']}")
    if settings.get("activations") is not None:
        said.append("keep the first layer in float: skip with its name, as the table of layers has it")
    return said


def _trained_gentler(settings: Mapping[str, Any]) -> list[str]:
    rate = settings.get("learning_rate")
    return [f"train gentler: learning_rate: {rate / 5:g} in place of {rate:g}"] if rate else ["a lower learning_rate"]


_WEAKER: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "prune_channels": _less_pruned,
    "prune_weights": _less_pruned,
    "prune_activations": _less_pruned,
    "quantize": _rounded_better,
    "train": _trained_gentler,
    "drop_blocks": lambda settings: ["drop fewer blocks: a lower count, or fewer names in blocks"],
    "share_weights": lambda settings: [f"more shared values: bits: {settings.get('bits', 4) + 1}"],
    "shrink_file": lambda settings: ["more bytes: a lower price, a lower max_drop, or more bytes"],
    "quantize_aware": lambda settings: ["more bits: weights: int8, activations: int8"],
    "resize": lambda settings: ["larger inputs"],
}
_CUT = {"prune_channels", "drop_blocks"}
_INTEGERS = {"quantize", "quantize_aware"}


def _more_gain(report: dict[str, Any], steps: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What the run did not do yet; else a tighter target."""
    names = {name for name, _ in steps}
    said = []
    if not names & _INTEGERS:
        said.append("int8: add - fold_batch_norm: {} and - quantize: {} at the end of the recipe")
    if not names & _CUT:
        said.append("fewer channels: --macs 0.5x in place of the recipe, with training behind it")
    time, aim = latency_change(report, report["rows"][-1], first_runtime(report)), _aim(report)
    if aim:
        said.append(f"a tighter target: --{aim[0]} {_share(0.7 * aim[1])} in place of {_share(aim[1])}")
    elif not said and time:
        now = min(1.0, time.left)
        said.append(f"a tighter target in place of the recipe: --latency {_share(_HALF * now)} ({_share(now)} now)")
    said.append("tersenet plan with the same options times that before anything is trained")
    return said


def _share(value: float) -> str:
    return f"{max(0.01, round(value, 2)):g}x"


def stored(report: dict[str, Any]) -> str | None:
    """That the .terse file is there for storing and sending, where it is smaller than what is deployed."""
    sizes, kind = report["rows"][-1].get("file_bytes", {}), deployed(report)
    names = [name for name in report["files"] if PurePath(name).suffix == ".terse"]
    if not names or not kind or kind == "terse" or not sizes.get("terse") or sizes["terse"] >= sizes.get(kind, 0):
        return None
    return (
        f"To store or send it: {names[0]}, {bytes_text(sizes['terse'])}, the same model; tersenet unpack makes an "
        ".onnx or .pt2 file of it where it arrives."
    )
