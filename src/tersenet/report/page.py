"""One self-contained HTML page for one run or several: no network, plotly.js written into it once.

The page is page.html with page_style.html and page_script.html; a content security policy in it forbids every request.
Everything that comes from a report is escaped.
"""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from tersenet.atomic import writing
from tersenet.errors import FileError, require
from tersenet.left_alone import share_text, some
from tersenet.report import words
from tersenet.report.headline import (
    drop,
    facts,
    first_runtime,
    headline_bytes,
    latency_change,
    missed_by,
    original_bytes,
    size_change,
)
from tersenet.report.plots import (
    Figure,
    bytes_waterfall,
    latency_waterfall,
    macs_waterfall,
    runtimes,
    score_plot,
    score_waterfall,
)
from tersenet.report.report import validate


def write_html(reports: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Writes one page for all the reports.

    Raises:
        FileError: when there is no report, or one does not fit the schema.
        MissingExtra: when plotly is not installed.
    """
    if not reports:
        raise FileError("a page needs at least one report, got 0; give the folder of a finished run")
    for report in reports:
        validate(report)
    plotly = require("plotly.offline", "report", "draw the plots of the HTML report")
    runs = [
        Drawn(report, name, f"run-{i}")
        for i, (report, name) in enumerate(zip(reports, run_names(reports), strict=True), 1)
    ]
    text = (
        environment()
        .get_template("page.html")
        .render(
            runs=runs,
            overview=overview(runs),
            figures={key: figure for run in runs for key, figure in run.figures.items()} | overview(runs),
            plotly_js=plotly.get_plotlyjs(),
            title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
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
    ):
        found.filters[function.__name__] = function
    found.filters |= {
        "percent_span": words.percent_span,
        "points_text": words.points_text,
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


def run_names(reports: Sequence[dict[str, Any]]) -> list[str]:
    """What each run is called: its model; runs of one model are told apart by their folder or a number."""
    names = [str(report["settings"].get("model") or "model") for report in reports]
    found: list[str] = []
    for index, (name, report) in enumerate(zip(names, reports, strict=True), start=1):
        out = Path(str(report["settings"].get("out") or index)).name
        found.append(name if names.count(name) == 1 else f"{name} {out}")
    return found if len(set(found)) == len(found) else [f"{name} ({i})" for i, name in enumerate(found, start=1)]


def escaped(figure: Figure) -> Figure:
    """Plotly reads a part of HTML in its texts, so names from a report are escaped there too; <b> and <br> stay."""
    for trace in figure["data"]:
        for key in ("x", "customdata", "text"):
            if key in trace:
                trace[key] = [escape_text(item) if isinstance(item, str) else item for item in trace[key]]
        if "name" in trace:
            trace["name"] = html.escape(trace["name"])
    return figure


def escape_text(text: str) -> str:
    safe = html.escape(text)
    for tag in ("<b>", "</b>", "<br>"):
        safe = safe.replace(html.escape(tag), tag)
    return safe


def overview(runs: list[Drawn]) -> dict[str, Figure]:
    """The two plots that hold all rows of all runs."""
    reports, names = [run.report for run in runs], [run.name for run in runs]
    found = {f"score-{against}": score_plot(reports, names, against) for against in ("size", "latency")}
    return {key: escaped(figure) for key, figure in found.items() if figure}


class Drawn:
    """A report as the template needs it."""

    def __init__(self, report: dict[str, Any], name: str, key: str) -> None:
        self.report, self.name, self.key = report, name, key
        self.rows, self.last = report["rows"], report["rows"][-1]
        self.runtime, self.runtimes = first_runtime(report), runtimes(report)
        self.kinds = list(dict.fromkeys(kind for row in self.rows for kind in row.get("file_bytes", {})))
        self.scored = [name for name in self.rows[0].get("scores", {}) if name != self.runtime]
        self.missed = [target for target in report.get("targets", []) if not target["met"]]
        drawn = {
            "bytes": bytes_waterfall(report),
            "macs": macs_waterfall(report),
            "latency": latency_waterfall(report),
            "score": score_waterfall(report),
        }
        self.figures = {f"{self.key}-{what}": escaped(figure) for what, figure in drawn.items() if figure}

    def waterfalls(self) -> list[tuple[str, str]]:
        """(key of the figure, its heading) of those that could be drawn."""
        heads = {
            "bytes": "Size of the file",
            "macs": "Multiply-adds",
            "latency": f"Latency in {words.runtime_name(self.runtime or '')}",
            "score": "Points of score",
        }
        return [(key, heads[key.removeprefix(f"{self.key}-")]) for key in self.figures]

    def tiles(self) -> list[dict[str, str]]:
        """The headline figures: what, how many times less, the two values, and whether it is good."""
        found = []
        size, latency = size_change(self.report, self.last), latency_change(self.report, self.last, self.runtime)
        before, after = original_bytes(self.report), headline_bytes(self.last)
        if size and before and after:
            line = f"{words.bytes_text(before[1])} to {words.bytes_text(after[1])}"
            head = "Size" if before[0] == after[0] else f"Size, .{before[0]} to .{after[0]}"
            found.append(tile(head, size.factor, size.left, "smaller", line, size.shrank, size.grew))
        if latency:
            line = f"{words.milliseconds_text(latency.before)} to {words.milliseconds_text(latency.after)}"
            head = f"Latency, {words.runtime_name(self.runtime or '')}"
            found.append(tile(head, latency.factor, latency.left, "faster", line, latency.shrank, latency.grew))
        macs = [row.get("macs") for row in (self.rows[0], self.last)]
        if macs[0] and macs[1]:
            line = f"{words.count_text(macs[0])} to {words.count_text(macs[1])}"
            good, bad = macs[1] < macs[0], macs[1] > macs[0]
            found.append(tile("Multiply-adds", macs[0] / macs[1], macs[1] / macs[0], "fewer", line, good, bad))
        return found + self.score_tiles()

    def score_tiles(self) -> list[dict[str, str]]:
        lost = drop(self.report, self.last)
        if lost is None:
            return []
        interval = self.last.get("score_interval")
        sure = bool(interval) and interval[1] < self.rows[0]["score"]
        line = f"{words.percent(self.rows[0]['score'])} to {words.percent(self.last['score'])}"
        below = f"95 % interval {words.percent_span(interval)}" if interval else "no interval"
        value = f"{words.points_text(abs(lost))} {'points lost' if lost >= 0.005 else 'points gained'}"
        value = "no loss" if abs(lost) < 0.005 else value
        mood = "bad" if sure else "good" if lost < 0.005 else "even"
        return [{"head": "Score", "value": value, "line": line, "below": below, "mood": mood}]

    def facts(self) -> str:
        return "; ".join(facts(self.report, self.rows[0]))

    def gain(self, row: dict[str, Any], kind: str) -> str:
        """Both ways, against the original, for a cell of the rows table; empty for the original itself."""
        if kind in self.kinds:
            before, after = original_bytes(self.report), row.get("file_bytes", {}).get(kind)
            itself = row is self.rows[0] and before is not None and kind == before[0]
            return "" if itself or not before or not after else words.both_ways(before[1], after)
        if row is self.rows[0]:
            return ""
        if kind in self.runtimes:
            change = latency_change(self.report, row, kind)
            return words.both_ways(change.before, change.after) if change else ""
        before_count, after_count = self.rows[0].get(kind), row.get(kind)
        if not before_count or not after_count or before_count == after_count:
            return ""
        return words.both_ways(before_count, after_count)

    def drop(self, row: dict[str, Any]) -> float | None:
        return None if row is self.rows[0] else drop(self.report, row)

    def missed_by(self, target: dict[str, Any]) -> str | None:
        return None if target["met"] or target["got"] is None else missed_by(target)

    def left_alone(self) -> list[tuple[str, dict[str, Any]]]:
        """(row, what one of its steps left alone), of all rows; a step within another is named beside it."""
        return [
            (row["step"] if row["step"].endswith(left["step"]) else f"{row['step']}: {left['step']}", left)
            for row in self.rows
            for left in row.get("left_alone", [])
        ]

    def layers(self) -> list[dict[str, Any]]:
        """The layers of what ships, each with its share of all MACs and what is left of the original layer's MACs."""
        listed: list[dict[str, Any]] = next((row["layers"] for row in reversed(self.rows) if row.get("layers")), [])
        before = {layer["path"]: layer for layer in self.rows[0].get("layers", [])}
        total = sum(layer.get("macs", 0) for layer in listed)
        return [
            {
                **{key: layer.get(key) for key in ("path", "kind", "params", "macs", "bytes")},
                "note": layer.get("note", ""),
                "share": layer.get("macs", 0) / total if total else None,
                "bytes_left": left(before.get(layer["path"], {}).get("bytes"), layer.get("bytes")),
            }
            for layer in listed
        ]


def left(before: float | None, after: float | None) -> float | None:
    return None if not before or after is None else after / before


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
