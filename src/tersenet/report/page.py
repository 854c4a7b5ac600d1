"""One self-contained HTML page for one run or several: no network, the plots drawn into it as inline SVG.

The page is page.html with page_style.html and page_script.html; a content security policy in it forbids every request.
Everything that comes from a report is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from tersenet.atomic import writing
from tersenet.errors import FileError
from tersenet.left_alone import share_text, some
from tersenet.numerics.scale import Scale
from tersenet.report import next_box, words
from tersenet.report.headline import (
    deployed,
    drop,
    first_runtime,
    float32_change,
    latency_change,
    missed_by,
    size_change,
    surely_worse,
)
from tersenet.report.layers import layer_table
from tersenet.report.plots import (
    bytes_waterfall,
    latency_waterfall,
    macs_waterfall,
    runtimes,
    score_plot,
    score_waterfall,
)
from tersenet.report.report import validate
from tersenet.report.settings import split_settings


def write_html(
    reports: Sequence[dict[str, Any]], path: str | os.PathLike[str], folders: Sequence[str | os.PathLike[str]] = ()
) -> None:
    """Writes one page for all the reports.

    Args:
        folders: of the runs, which name them where there are several; without, they are named by their models.
    Raises:
        FileError: when there is no report, or one does not fit the schema.
    """
    if not reports:
        raise FileError("a page needs at least one report, got 0; give the folder of a finished run")
    for report in reports:
        validate(report)
    names = run_names(reports, folders)
    runs = [Drawn(report, name, f"run-{i}") for i, (report, name) in enumerate(zip(reports, names, strict=True), 1)]
    plots = {against: score_plot(reports, names, against) for against in ("size", "latency")}
    text = (
        environment()
        .get_template("page.html")
        .render(
            runs=runs,
            overview={against: Markup(plot) for against, plot in plots.items() if plot},
            scored=any(row.get("score") is not None for report in reports for row in report["rows"]),
            title=names[0] if len(runs) == 1 else f"{len(runs)} runs",
        )
    )
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def environment() -> Environment:
    """Jinja with escaping on and the words of the report as filters. A key that a report leaves out reads as false."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (
        words.bytes_text,
        words.count_text,
        words.milliseconds_text,
        words.milliseconds_span,
        words.percent,
        words.seconds_text,
    ):
        found.filters[function.__name__] = function
    found.filters |= {
        "plain": words.plain,
        "unbroken": unbroken,
    }
    found.filters |= {"share_text": share_text, "some": some}
    found.filters |= {
        "runtime_name": words.runtime_name,
        "factor_text": words.factor_text,
        "left_text": words.left_text,
    }
    return found


def unbroken(text: str) -> str:
    """Text in which a number and its percent sign stay on one line."""
    return text.replace(" %", "\u00a0%")


def run_names(reports: Sequence[dict[str, Any]], folders: Sequence[str | os.PathLike[str]] = ()) -> list[str]:
    """What each run is called: one alone by its model, several by as much of their folders as tells them apart."""
    models = [str(report["settings"].get("model") or "model") for report in reports]
    if len(reports) == 1:
        return models
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    longest = max(map(len, paths), default=0)
    for depth in range(1, longest + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(reports):
            return names
    if len(set(models)) == len(models):
        return models
    return [f"{model} ({index})" for index, model in enumerate(models, start=1)]


class Drawn:
    """A report as the template needs it."""

    def __init__(self, report: dict[str, Any], name: str, key: str) -> None:
        self.report, self.name, self.key = report, name, key
        self.rows, self.last = report["rows"], report["rows"][-1]
        self.scale, self.kind = Scale.of(report), deployed(report)
        self.runtime, self.runtimes = first_runtime(report), runtimes(report)
        self.kinds = list(dict.fromkeys(kind for row in self.rows for kind in row.get("file_bytes", {})))
        self.kinds.sort(key=lambda kind: kind != self.kind)
        self.scored = [name for name in self.rows[0].get("scores", {}) if name != self.runtime]
        self.missed = [target for target in report.get("targets", []) if not target["met"]]
        self.deploy, self.stored = next_box.deploy(report), next_box.stored(report)
        self.advice, self.bought = next_box.advice(report), next_box.bought(report)
        self.settings, self.defaults = split_settings(report["settings"])
        self.layers = layer_table(report)

    def waterfalls(self) -> list[tuple[str, str, Markup]]:
        """(what, heading, picture) of those that can be drawn."""
        drawn = {
            "bytes": (f"Size of the .{self.kind} file", bytes_waterfall(self.report, self.kind)),
            "latency": (
                f"Latency in {words.runtime_name(self.runtime or '')}",
                latency_waterfall(self.report),
            ),
            "score": (self.scale.heading, score_waterfall(self.report)),
            "macs": ("Multiply-adds", macs_waterfall(self.report)),
            "terse": (
                "Size of the .terse file",
                None if self.kind == "terse" else bytes_waterfall(self.report, "terse"),
            ),
        }
        return [(what, head, Markup(picture)) for what, (head, picture) in drawn.items() if picture]

    def tiles(self) -> list[dict[str, str]]:
        """The headline figures: what, how many times less, the two values, and whether it is good."""
        found = []
        if size := size_change(self.report, self.last, self.kind):
            line = f"{words.bytes_text(size.before)} to {words.bytes_text(size.after)}"
            found.append(
                tile(f"Size of the .{self.kind}", size.factor, size.left, "smaller", line, size.shrank, size.grew)
            )
        if latency := latency_change(self.report, self.last, self.runtime):
            line = f"{words.milliseconds_text(latency.before)} to {words.milliseconds_text(latency.after)}"
            head = f"Latency, {words.runtime_name(self.runtime or '')}"
            found.append(tile(head, latency.factor, latency.left, "faster", line, latency.shrank, latency.grew))
        if self.kind != "terse" and (size := size_change(self.report, self.last, "terse")):
            line = f"{words.bytes_text(size.before)} to {words.bytes_text(size.after)}"
            each = tile("Size of the .terse", size.factor, size.left, "smaller", line, size.shrank, size.grew)
            if raw := float32_change(self.report, self.last):
                each["below"] = f"{words.factor_text(raw.factor)} smaller than float32 weights"
            found.append(each)
        macs = [row.get("macs") for row in (self.rows[0], self.last)]
        if macs[0] and macs[1]:
            line = f"{words.count_text(macs[0])} to {words.count_text(macs[1])}"
            good, bad = macs[1] < macs[0], macs[1] > macs[0]
            found.append(tile("Multiply-adds", macs[0] / macs[1], macs[1] / macs[0], "fewer", line, good, bad))
        return found + self.score_tiles()

    def score_tiles(self) -> list[dict[str, str]]:
        lost, scale = drop(self.report, self.last), self.scale
        if lost is None:
            return []
        before, after, interval = self.rows[0]["score"], self.last["score"], self.last.get("score_interval")
        value = f"{scale.loss_text(abs(lost))} {'lost' if lost > 0 else 'gained'}"
        even = scale.same(before, after)
        mood = "bad" if surely_worse(self.report, self.last) else "good" if even or lost < 0 else "even"
        line = f"{scale.text(before)} to {scale.text(after)}"
        below = f"95 % interval {scale.span(interval)}" if interval else "no interval"
        return [
            {"head": scale.heading, "value": "no loss" if even else value, "line": line, "below": below, "mood": mood}
        ]

    def score(self, value: float) -> str:
        return self.scale.text(value)

    def span(self, interval: Sequence[float]) -> str:
        return self.scale.span(interval)

    def lost(self, row: dict[str, Any]) -> str | None:
        """What a row lost against the original, as a number; None for the original."""
        lost = None if row is self.rows[0] else drop(self.report, row)
        return None if lost is None else self.scale.loss_number(lost)

    def gain(self, row: dict[str, Any], kind: str) -> str:
        """Both ways, against the original, for a cell of the rows table; empty for the original itself."""
        if row is self.rows[0]:
            return ""
        if kind in self.kinds:
            size = size_change(self.report, row, kind)
            return words.both_ways(size.before, size.after) if size else ""
        if kind in self.runtimes:
            change = latency_change(self.report, row, kind)
            return words.both_ways(change.before, change.after) if change else ""
        before_count, after_count = self.rows[0].get(kind), row.get(kind)
        if not before_count or not after_count or before_count == after_count:
            return ""
        return words.both_ways(before_count, after_count)

    def missed_by(self, target: dict[str, Any]) -> str | None:
        return None if target["met"] or target["got"] is None else missed_by(target)

    def left_alone(self) -> list[tuple[str, dict[str, Any]]]:
        """(row, what one of its steps left alone), of all rows; a step within another is named beside it."""
        return [
            (row["step"] if row["step"].endswith(left["step"]) else f"{row['step']}: {left['step']}", left)
            for row in self.rows
            for left in row.get("left_alone", [])
        ]


def tile(head: str, factor: float, share: float, word: str, line: str, good: bool, bad: bool) -> dict[str, str]:
    """A headline figure. What did not change for sure says so instead of a flattering number."""
    value = (
        f"{words.factor_text(factor)} {word}" if good else f"{words.factor_text(share)} of before" if bad else "no gain"
    )
    return {
        "head": head,
        "value": value,
        "line": line,
        "below": f"{words.left_text(share)} is left",
        "mood": "good" if good else "bad" if bad else "even",
    }
