"""The plots of the page as inline SVG: what each step took away, and score against size and latency.

Each function returns the picture as a string (svg.py), or None where there is nothing to draw.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tersenet.numerics.scale import Scale
from tersenet.report import svg
from tersenet.report.headline import deployed, drop, first_runtime, latency_change, read_by
from tersenet.report.words import both_ways, bytes_text, count_text, factor_text, milliseconds_text, runtime_name

COLORS = 6
# Of a waterfall: the column of the names, a row's height, the room for figures beside the bars.
_WIDTH, _NAMES, _ROW, _FIGURES = 370.0, 124.0, 24.0, 46.0
# Of a scatter plot.
_WIDE, _HIGH = 400.0, 280.0


@dataclass(frozen=True)
class Bar:
    """One row of a waterfall, in the unit of its axis.

    Args:
        name: of the step.
        start, end: where the bar begins and ends.
        said: the figure beside it.
        tip: what is shown when it is pointed at.
        mood: "total", "good", "bad" or "even".
    """

    name: str
    start: float
    end: float
    said: str
    tip: str
    mood: str


def waterfall(bars: Sequence[Bar], title: str, label: str, band: Sequence[float] | None = None) -> str:
    """Bars below each other: the original, what each step changed, and what is left.

    Args:
        title: of the axis, with its unit.
        label: names the picture.
        band: an interval that is drawn behind the bars.
    """
    values = [0.0, *(value for bar in bars for value in (bar.start, bar.end)), *(band or ())]
    low, high = min(values), max(values)
    left = svg.Axis(low, high if high > low else low + 1, _NAMES, _WIDTH - _FIGURES)
    if low < 0:  # figures of bars that reach to the left stand there
        left = svg.Axis(low, left.high, _NAMES + _FIGURES, _WIDTH - _FIGURES)
    bottom = 6 + _ROW * len(bars)
    parts = svg.across(left, 4, bottom, title, count=4)
    if band is not None:
        x = left(band[0])
        parts.append(svg.element("rect", x=x, y=4, width=left(band[1]) - x, height=bottom - 4, class_="band"))
    parts.append(svg.line(left(0), 4, left(0), bottom, "zero"))
    for index, bar in enumerate(bars):
        parts.append(_bar(bar, left, 6 + _ROW * index))
        if index + 1 < len(bars):
            parts.append(
                svg.line(left(bar.end), 6 + _ROW * index + 18, left(bar.end), 6 + _ROW * (index + 1) + 4, "link")
            )
    return svg.drawing(_WIDTH, bottom + 2 * svg.FONT + 16, label, parts)


def _bar(bar: Bar, axis: svg.Axis, top: float) -> str:
    x, far = sorted((axis(bar.start), axis(bar.end)))
    middle = top + 11 + svg.FONT / 3
    to_left = bar.end < 0 and bar.mood != "total"
    inside = [
        svg.text(_NAMES - 8, middle, svg.cut(bar.name, _NAMES - 10), "end", "name"),
        svg.element("rect", x=x, y=top + 4, width=max(far - x, 1.5), height=14, rx=2, class_=bar.mood),
        svg.text(x - 5 if to_left else far + 5, middle, bar.said, "end" if to_left else "start", "figure"),
    ]
    return svg.element("g", "".join(inside), tip=bar.tip)


def _changes(names: Sequence[str], values: Sequence[float], said: Sequence[str], tips: Sequence[str]) -> list[Bar]:
    """The bars of a quantity of which less is better."""
    bars = [Bar(names[0], 0.0, values[0], said[0], f"{names[0]}: {tips[0]}", "total")]
    for index, (before, after) in enumerate(itertools.pairwise(values), start=1):
        mood = "good" if after < before else "bad" if after > before else "even"
        bars.append(Bar(names[index], before, after, said[index], f"{names[index]}: {tips[index]}", mood))
    return [*bars, Bar("result", 0.0, values[-1], said[-1], f"result: {tips[-1]}", "total")]


def _known(rows: list[dict[str, Any]], values: Sequence[float | None]) -> tuple[list[dict[str, Any]], list[float]]:
    """The rows where a quantity is known, with it."""
    pairs = [(row, value) for row, value in zip(rows, values, strict=True) if value is not None]
    return [row for row, _ in pairs], [value for _, value in pairs]


def bytes_waterfall(report: dict[str, Any], kind: str | None) -> str | None:
    """Of the files of one format."""
    rows, values = _known(report["rows"], [row.get("file_bytes", {}).get(kind) for row in report["rows"]])
    scale, unit = (2**20, "MiB") if values and max(values) >= 2**20 else (2**10, "KiB")
    labels = [bytes_text(value) for value in values]
    return _filled(rows, values, scale, labels, f"size of the .{kind} file, {unit}")


def macs_waterfall(report: dict[str, Any]) -> str | None:
    rows, values = _known(report["rows"], [row.get("macs") for row in report["rows"]])
    scale, unit = (1e9, "billions") if values and max(values) >= 1e9 else (1e6, "millions")
    return _filled(rows, values, scale, [count_text(v) for v in values], f"multiply-adds, {unit}")


def latency_waterfall(report: dict[str, Any]) -> str | None:
    runtime = first_runtime(report)
    found = [row.get("latency_ms", {}).get(runtime) for row in report["rows"]]
    rows, values = _known(report["rows"], [None if latency is None else latency["median"] for latency in found])
    labels = [milliseconds_text(value) for value in values]
    return _filled(rows, values, 1.0, labels, f"one call in {runtime_name(runtime or '')}, ms")


def _filled(rows: list[dict[str, Any]], values: list[float], scale: float, labels: list[str], title: str) -> str | None:
    """A waterfall of a quantity that is never negative; None where there is no step to compare."""
    if len(values) < 2 or max(values) <= 0:
        return None
    tips = [f"{label} ({both_ways(values[0], value)})" for label, value in zip(labels, values, strict=True)]
    scaled = [value / scale for value in values]
    # The axis says the unit, so that the figures beside the bars stay short.
    bars = _changes([row["step"] for row in rows], scaled, [f"{value:.3g}" for value in scaled], tips)
    return waterfall(bars, title, f"{title}, by step")


def score_waterfall(report: dict[str, Any]) -> str | None:
    """What each step gained or lost, from the original's score as zero, with the original's interval as a band."""
    scale = Scale.of(report)
    rows, lost = _known(report["rows"], [drop(report, row) for row in report["rows"]])
    if len(rows) < 2:
        return None
    values = [-each for each in lost]
    tips = [scale.text(row["score"]) + _interval(row, scale) for row in rows]
    bars = []
    for index, (before, after) in enumerate(itertools.pairwise(values), start=1):
        name, mood = rows[index]["step"], "good" if after > before else "bad" if after < before else "even"
        bars.append(Bar(name, before, after, scale.loss_number(after), f"{name}: {tips[index]}", mood))
    ships = Bar("result", 0.0, values[-1], bars[-1].said, f"result: {tips[-1]}", "total")
    interval, band = rows[0].get("score_interval"), None
    if interval:
        band = sorted(-scale.lost(rows[0]["score"], end) for end in interval)
    unit = f", {scale.loss_unit}" if scale.loss_unit else ""
    title = f"{scale.name} against the original{unit}" + ("" if scale.higher_is_better else ", left is worse")
    return waterfall([*bars, ships], title, f"{title}, by step", band)


def _interval(row: dict[str, Any], scale: Scale) -> str:
    return f", 95 % interval {scale.span(row['score_interval'])}" if row.get("score_interval") else ""


def runtimes(report: dict[str, Any]) -> list[str]:
    """Every runtime that a row has a latency in, that of the headline first."""
    found = [first_runtime(report), *(name for row in report["rows"] for name in row.get("latency_ms", {}))]
    return list(dict.fromkeys(name for name in found if name))


@dataclass(frozen=True)
class Point:
    """One row in a scatter plot; ends are those of 95 % intervals."""

    x: float
    y: float
    tip: str
    x_ends: tuple[float, float] | None = None
    y_ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """The rows of one run in one runtime, in the order of the steps.

    Args:
        name: for the legend.
        color, shape: numbers of them.
        ends: whether its first and last point are named.
    """

    name: str
    points: list[Point]
    color: int
    shape: int
    ends: bool = False


def score_series(reports: Sequence[dict[str, Any]], names: Sequence[str], against: str) -> list[Series]:
    """Score against "size" or "latency": one series per run, and per runtime where latencies are shown."""
    found: list[Series] = []
    for index, (report, name) in enumerate(zip(reports, names, strict=True)):
        kind = deployed(report)
        for place, runtime in enumerate([None] if against == "size" else runtimes(report)):
            points = [point for row in report["rows"] if (point := _point(report, row, runtime, kind))]
            label = " · ".join([*([name] if len(reports) > 1 else []), *([runtime_name(runtime)] if runtime else [])])
            color = (index if len(reports) > 1 else place) % COLORS
            if points:
                whole = not found and len(points) == len(report["rows"]) > 1
                found.append(Series(label or name, points, color, place, whole))
    return found


def score_plot(reports: Sequence[dict[str, Any]], names: Sequence[str], against: str) -> str | None:
    """Score against "size" or "latency": every row of every run, joined in the order of the steps, with intervals.

    None where nothing is scored, or where the runs are not scored by one metric.
    """
    scales = {Scale.of(report) for report in reports}
    series = score_series(reports, names, against)
    if not series or len(scales) > 1:
        return None
    scale = scales.pop()
    kinds = sorted({f".{kind}" for report in reports if (kind := deployed(report))})
    title = "one call, ms" if against == "latency" else f"size of the {' or '.join(kinds)} file, KiB"
    if against == "size" and max(point.x for each in series for point in each.points) >= 1024:
        title = title.replace("KiB", "MiB")
        series = [Series(s.name, [_shrunk(p) for p in s.points], s.color, s.shape, s.ends) for s in series]
    unit = f", {scale.unit}" if scale.unit else ""
    return scatter(series, title, scale.head + unit, f"{scale.name} against {against}")


def _shrunk(point: Point) -> Point:
    return Point(point.x / 1024, point.y, point.tip, None, point.y_ends)


def scatter(series: Sequence[Series], x_title: str, y_title: str, label: str) -> str:
    """Points joined by dotted lines, with bars for the intervals, and a legend where there are several."""
    legend, top = _legend(series) if len(series) > 1 else ([], 8.0)
    points = [point for each in series for point in each.points]
    ys = [value for point in points for value in (point.y, *(point.y_ends or ()))]
    xs = [value for point in points for value in (point.x, *(point.x_ends or ()))]
    room = 0.08 * (max(ys) - min(ys)) or abs(ys[0]) * 0.01 or 1.0
    bottom = _HIGH - 2 * svg.FONT - 16 + top - 8
    up = svg.Axis(min(ys) - room, max(ys) + room, bottom, top)
    widest = max(len(said) for _, said in up.labelled(5))
    left = svg.FONT + 14 + svg.LETTER * widest
    along = svg.Axis(0.0, 1.06 * max(xs) or 1.0, left, _WIDE - 10)
    parts = [
        *legend,
        *svg.upward(up, left, _WIDE - 10, y_title, svg.FONT, 5),
        *svg.across(along, top, bottom, x_title, 6),
    ]
    for each in series:
        parts += _drawn(each, along, up)
    return svg.drawing(_WIDE, bottom + 2 * svg.FONT + 16, label, parts)


def _legend(series: Sequence[Series]) -> tuple[list[str], float]:
    """The parts of a legend above the plot, and where the plot begins."""
    parts, x, y = [], 8.0, 10.0
    for each in series:
        said = svg.cut(each.name, _WIDE - 40)
        if x > 8 and x + 16 + svg.width_of(said) > _WIDE:
            x, y = 8.0, y + 17
        parts += [
            svg.marker(x + 5, y, each.shape, f"var(--run-{each.color})"),
            svg.text(x + 15, y + 4, said, "start", "name"),
        ]
        x += 30 + svg.width_of(said)
    return parts, y + 16


def _drawn(series: Series, along: svg.Axis, up: svg.Axis) -> list[str]:
    color = f"var(--run-{series.color})"
    path = " ".join(f"{svg.number(along(p.x))},{svg.number(up(p.y))}" for p in series.points)
    parts = [svg.element("polyline", points=path, fill="none", stroke=color, class_="path")]
    for point in series.points:
        x, y = along(point.x), up(point.y)
        inside = []
        if point.y_ends:
            inside.append(svg.line(x, up(point.y_ends[0]), x, up(point.y_ends[1]), "ends", stroke=color))
        if point.x_ends:
            inside.append(svg.line(along(point.x_ends[0]), y, along(point.x_ends[1]), y, "ends", stroke=color))
        inside.append(svg.marker(x, y, series.shape, color))
        parts.append(svg.element("g", "".join(inside), tip=point.tip))
    if series.ends:
        for point, said in ((series.points[0], "original"), (series.points[-1], "result")):
            # A name turns towards the middle, so that the edge does not cut it off.
            to_left = along(point.x) > (along.start + along.end) / 2
            x = along(point.x) + (-9 if to_left else 9)
            parts.append(svg.text(x, up(point.y) + 15, said, "end" if to_left else "start", "name"))
    return parts


def _point(report: dict[str, Any], row: dict[str, Any], runtime: str | None, kind: str | None) -> Point | None:
    """One row: the score in that runtime where it is known, with an interval as wide as the headline score's; sizes are
    KiB of the deployed format."""
    score, scale = row.get("scores", {}).get(runtime, row.get("score")), Scale.of(report)
    if score is None:
        return None
    shift = score - row["score"] if row.get("score") is not None else 0.0
    interval = row.get("score_interval")
    ends = (scale.number(interval[0] + shift), scale.number(interval[1] + shift)) if interval else None
    tip = f"{row['step']}\n{scale.text(score)}{_interval(row, scale)}\n"
    if runtime is None:
        size = row.get("file_bytes", {}).get(kind)
        tip += f"{bytes_text(size)} as .{kind}" if size else ""
        return Point(size / 1024, scale.number(score), tip, None, ends) if size else None
    latency = row.get("latency_ms", {}).get(runtime)
    if not latency:
        return None
    change = latency_change(report, row, runtime)
    gain = f" ({factor_text(change.factor)})" if change and row is not report["rows"][0] else ""
    tip += f"{milliseconds_text(latency['median'])}{gain} in {runtime_name(runtime)}, the .{read_by(runtime)} file"
    return Point(latency["median"], scale.number(score), tip, (latency["low"], latency["high"]), ends)
