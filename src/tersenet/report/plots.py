"""The plots of the page, as plain plotly figures: {"data": [...], "layout": {...}} that survive JSON.

A colour is written as the page's CSS variable ("var(--good)"); the page's script puts the value in when it draws, so
the plots follow light and dark mode.
"""

from __future__ import annotations

import itertools
from typing import Any

from tersenet.report.headline import drop, first_runtime, headline_bytes, latency_change
from tersenet.report.words import (
    both_ways,
    bytes_text,
    count_text,
    factor_text,
    milliseconds_text,
    percent,
    percent_span,
    points_text,
    runtime_name,
)

Figure = dict[str, Any]
COLOURS = 6
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross")


def layout(**extra: Any) -> dict[str, Any]:
    """What all plots share: transparent, the page's font, quiet axes."""
    axis = {"gridcolor": "var(--line)", "zeroline": False, "automargin": True, "fixedrange": True}
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--muted)"},
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "hoverlabel": {
            "bgcolor": "var(--card)",
            "bordercolor": "var(--line)",
            "font": {"color": "var(--text)"},
            "align": "left",
        },
        "showlegend": False,
        "dragmode": False,
        **extra,
        "xaxis": {**axis, **extra.get("xaxis", {})},
        "yaxis": {**axis, **extra.get("yaxis", {})},
    }


def waterfall(steps: list[str], values: list[float], labels: list[str], hovers: list[str], title: str) -> Figure:
    """The original, what each step took away or added, and what is left. All bars start at zero.

    Args:
        steps: names, the original first; a last bar "shipped" is added.
        values: the quantity after each step.
        labels: what is written on each bar.
        hovers: what is shown when a bar is pointed at.
        title: of the vertical axis.
    """
    changes = [after - before for before, after in itertools.pairwise(values)]
    trace = {
        "type": "waterfall",
        "x": [*unique(steps), "shipped"],
        "y": [values[0], *changes, values[-1]],
        "measure": ["absolute", *["relative"] * len(changes), "total"],
        "text": [*labels, labels[-1]],
        "customdata": [*hovers, hovers[-1]],
        "hovertemplate": "<b>%{x}</b><br>%{customdata}<extra></extra>",
        "textposition": "outside",
        "cliponaxis": False,
        "constraintext": "none",
        "textangle": 0,
        "textfont": {"size": 10.5, "color": "var(--text)"},
        "connector": {"line": {"color": "var(--line)", "width": 1}},
        "decreasing": {"marker": {"color": "var(--good)"}},
        "increasing": {"marker": {"color": "var(--bad)"}},
        "totals": {"marker": {"color": "var(--total)"}},
    }
    high = max(values)
    # What falls has its label below its bar: near zero it would stand on the names of the steps.
    falls_low = any(change < 0 and after < 0.1 * high for change, after in zip(changes, values[1:], strict=True))
    axes: dict[str, Any] = {
        "xaxis": {"showgrid": False, "tickangle": -35},
        "yaxis": {"title": {"text": title}, "range": [-0.1 * high if falls_low else 0, 1.14 * high or 1], "nticks": 5},
    }
    return {"data": [trace], "layout": layout(**axes)}


def unique(names: list[str]) -> list[str]:
    """Bars of one name would be stacked on one place, so a name that comes again gets a number."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def known(rows: list[dict[str, Any]], values: list[float | None]) -> tuple[list[dict[str, Any]], list[float]]:
    """The rows where a quantity is known, with it."""
    pairs = [(row, value) for row, value in zip(rows, values, strict=True) if value is not None]
    return [row for row, _ in pairs], [value for _, value in pairs]


def bytes_waterfall(report: dict[str, Any]) -> Figure | None:
    """Of the headline file, in the one format that all its rows have."""
    last = headline_bytes(report["rows"][-1])
    if last is None:
        return None
    rows, values = known(report["rows"], [row.get("file_bytes", {}).get(last[0]) for row in report["rows"]])
    scale, unit = (2**20, "MiB") if max(values) >= 2**20 else (2**10, "KiB")
    labels = [bytes_text(value) for value in values]
    return filled(rows, [value / scale for value in values], values, labels, f"{unit} as .{last[0]}")


def macs_waterfall(report: dict[str, Any]) -> Figure | None:
    rows, values = known(report["rows"], [row.get("macs") for row in report["rows"]])
    scale, unit = (1e9, "G") if values and max(values) >= 1e9 else (1e6, "M")
    return filled(rows, [value / scale for value in values], values, [count_text(v) for v in values], f"{unit} MACs")


def latency_waterfall(report: dict[str, Any]) -> Figure | None:
    runtime = first_runtime(report)
    found = [row.get("latency_ms", {}).get(runtime) for row in report["rows"]]
    rows, values = known(report["rows"], [None if latency is None else latency["median"] for latency in found])
    labels = [milliseconds_text(value) for value in values]
    return filled(rows, values, values, labels, f"ms in {runtime_name(runtime or '')}")


def filled(
    rows: list[dict[str, Any]], scaled: list[float], values: list[float], labels: list[str], title: str
) -> Figure | None:
    """A waterfall of a quantity that is never negative; None where there is no step to compare."""
    if len(values) < 2 or max(values) <= 0:
        return None
    hovers = [f"{label} ({both_ways(values[0], value)})" for label, value in zip(labels, values, strict=True)]
    # The axis says the unit, so that the numbers on the bars stay short enough for a phone.
    return waterfall([row["step"] for row in rows], scaled, [f"{value:.3g}" for value in scaled], hovers, title)


def score_waterfall(report: dict[str, Any]) -> Figure | None:
    """Points gained or lost by each step, from the original's score as zero, with the original's interval as a band."""
    rows, lost = known(report["rows"], [drop(report, row) for row in report["rows"]])
    if len(rows) < 2:
        return None
    values = [-points for points in lost]
    labels = [points_text(value) for value in values]
    hovers = [percent(row["score"]) + span(row) for row in rows]
    figure = waterfall([row["step"] for row in rows], values, labels, hovers, "points against the original")
    trace = figure["data"][0]
    trace["decreasing"], trace["increasing"] = trace["increasing"], trace["decreasing"]
    low, high = min([0.0, *values]), max([0.0, *values])
    interval = rows[0].get("score_interval")
    if interval:
        ends = [100 * (end - rows[0]["score"]) for end in interval]
        band = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": ends[0], "y1": ends[1], "layer": "below"}
        figure["layout"]["shapes"] = [{**band, "fillcolor": "var(--band)", "line": {"width": 0}}]
        low, high = min(low, ends[0]), max(high, ends[1])
    room = 0.16 * (high - low) or 1.0
    figure["layout"]["yaxis"]["range"] = [low - room, high + room]
    figure["layout"]["yaxis"].update(zeroline=True, zerolinecolor="var(--muted)", zerolinewidth=1)
    return figure


def span(row: dict[str, Any]) -> str:
    return f", 95 % interval {percent_span(row['score_interval'])}" if row.get("score_interval") else ""


def score_plot(reports: list[dict[str, Any]], names: list[str], against: str) -> Figure | None:
    """Score against "size" or "latency": every row of every run, joined in the order of the steps, with intervals."""
    traces = []
    for index, (report, name) in enumerate(zip(reports, names, strict=True)):
        for place, series in enumerate([None] if against == "size" else runtimes(report)):
            trace = score_trace(report, series)
            if not trace["x"]:
                continue
            label = " · ".join([*([name] if len(reports) > 1 else []), *([runtime_name(series)] if series else [])])
            colour = f"var(--run-{(index if len(reports) > 1 else place) % COLOURS})"
            trace |= {"name": label or name, "line": {"color": colour, "width": 1, "dash": "dot"}}
            trace["marker"] = {"color": colour, "size": 9, "symbol": SYMBOLS[place % len(SYMBOLS)]}
            for error in ("error_x", "error_y"):
                if error in trace:
                    trace[error] |= {"color": colour, "thickness": 1, "width": 3}
            traces.append(trace)
    if not traces:
        return None
    name_ends(traces[0], reports[0]["rows"])
    biggest = max(value for trace in traces for value in trace["x"])
    across = "ms per call" if against == "latency" else "MiB" if biggest > 1 else "KiB"
    if across == "KiB":
        for trace in traces:
            trace["x"] = [1024 * value for value in trace["x"]]
    return {"data": traces, "layout": score_layout(traces, across)}


def name_ends(trace: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Writes "original" and "shipped" at the ends of a line; more names would cover each other."""
    if len(rows) > 1 and len(trace["x"]) == len(rows):
        between = len(rows) - 2
        trace["mode"] = "lines+markers+text"
        trace["text"] = ["original", *[""] * between, "shipped"]
        middle = max(trace["x"]) / 2  # a name turns towards it, so that the axis does not cut it off
        places = ["bottom right" if x <= middle else "bottom left" for x in (trace["x"][0], trace["x"][-1])]
        trace["textposition"] = [places[0], *["top center"] * between, places[1]]
        trace["textfont"] = {"size": 11, "color": "var(--text)"}


def score_layout(traces: list[dict[str, Any]], across: str) -> dict[str, Any]:
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "itemclick": False, "itemdoubleclick": False}
    return layout(
        xaxis={"title": {"text": across}, "rangemode": "tozero", "nticks": 7},
        yaxis={"title": {"text": "score, %"}, "nticks": 7},
        showlegend=len(traces) > 1,
        legend=legend,
        margin={"l": 8, "r": 12, "t": 36 if len(traces) > 1 else 12, "b": 8},
    )


def runtimes(report: dict[str, Any]) -> list[str]:
    """Every runtime that a row has a latency in, that of the headline first."""
    found = [first_runtime(report), *(name for row in report["rows"] for name in row.get("latency_ms", {}))]
    return list(dict.fromkeys(name for name in found if name))


def score_trace(report: dict[str, Any], runtime: str | None) -> dict[str, Any]:
    """The points of one run: MiB of the headline file across, or the latency in a runtime; score in percent up."""
    points = [point for row in report["rows"] if (point := score_point(report, row, runtime))]
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [point["x"] for point in points],
        "y": [point["y"] for point in points],
        "customdata": [point["hover"] for point in points],
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    for axis in ("y", "x"):
        ends = [point[f"{axis}_ends"] for point in points]
        if points and all(ends):
            trace[f"error_{axis}"] = {
                "type": "data",
                "symmetric": False,
                "array": [end[1] - point[axis] for end, point in zip(ends, points, strict=True)],
                "arrayminus": [point[axis] - end[0] for end, point in zip(ends, points, strict=True)],
            }
    return trace


def score_point(report: dict[str, Any], row: dict[str, Any], runtime: str | None) -> dict[str, Any] | None:
    """One row: the score in that runtime where it is known, with an interval as wide as the headline score's."""
    score = row.get("scores", {}).get(runtime, row.get("score"))
    if score is None:
        return None
    interval = row.get("score_interval")
    shift = score - row["score"] if row.get("score") is not None else 0.0
    point: dict[str, Any] = {"y": 100 * score, "x_ends": None}
    point["y_ends"] = [100 * (end + shift) for end in interval] if interval else None
    hover = [f"<b>{row['step']}</b>", percent(score) + span(row)]
    if runtime is None:
        size = headline_bytes(row)
        if size is None:
            return None
        return point | {"x": size[1] / 2**20, "hover": "<br>".join([*hover, f"{bytes_text(size[1])} as .{size[0]}"])}
    latency = row.get("latency_ms", {}).get(runtime)
    if not latency:
        return None
    change = latency_change(report, row, runtime)
    gain = f" ({factor_text(change.factor)})" if change and row is not report["rows"][0] else ""
    hover.append(f"{milliseconds_text(latency['median'])}{gain} in {runtime_name(runtime)}")
    return point | {"x": latency["median"], "x_ends": [latency["low"], latency["high"]], "hover": "<br>".join(hover)}
