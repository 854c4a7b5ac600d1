"""The rows of a report as a table for the terminal, made to fit 80 columns."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from tersenet.left_alone import LeftAlone, lines
from tersenet.numerics.scale import Scale
from tersenet.report.headline import (
    Change,
    deployed,
    drop,
    first_runtime,
    latency_change,
    size_change,
    surely_worse,
)
from tersenet.report.words import (
    both_ways,
    bytes_text,
    count_text,
    milliseconds_span,
    milliseconds_text,
    runtime_name,
)

# A change of less than so much is not worth its figures.
_NOTHING = 0.015


def table(report: dict[str, Any]) -> Table:
    """Steps down, quantities across; under each value its 95 % interval, or the gain both ways ("2.8x; 0.36")."""
    rows, runtime, kind = report["rows"], first_runtime(report), deployed(report)
    # The sizes of the file that is deployed and of the .terse file; report.html and report.json have them all.
    kinds = [kind] if kind else []
    if kind != "terse" and any("terse" in row.get("file_bytes", {}) for row in rows):
        kinds.append("terse")
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    grid.caption, grid.caption_justify = caption(report, runtime), "left"
    grid.add_column("step", overflow="fold", min_width=9, max_width=20)
    scale = Scale.of(report)
    heads = [scale.name, "MACs", *(f".{kind}" for kind in kinds)]
    for head in [*heads, *([runtime_name(runtime)] if runtime else [])]:
        grid.add_column(head, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        cells = [score_cell(report, row, scale), macs_cell(report, row)]
        cells += [bytes_cell(report, row, kind) for kind in kinds]
        if runtime:
            cells.append(latency_cell(report, row, runtime))
        shipped = index == len(rows) - 1 and index > 0
        grid.add_row(Text(row["step"], style="bold" if shipped else ""), *cells, end_section=index == 0)
    return grid


def notes(report: dict[str, Any]) -> list[str]:
    """What a reader must know beside the figures: what each step left alone, its notes, then the warnings."""
    said = []
    for row in report["rows"]:
        for left in row.get("left_alone", []):
            head = row["step"] if row["step"].endswith(left["step"]) else f"{row['step']}: {left['step']}"
            first, *rest = lines(LeftAlone.of_json(left))
            said += [f"{head}: {first}", *rest]
        said += [f"{row['step']}: {note}" for note in row.get("notes", [])]
    return [*said, *(f"mind: {warning}" for warning in report.get("warnings", []))]


def caption(report: dict[str, Any], runtime: str | None) -> str:
    """What the columns rest on: samples, intervals, threads and batch, and what the gains are held against."""
    said = []
    samples = sorted({row["samples"] for row in report["rows"] if row.get("samples")})
    if samples:
        counts = " or ".join(f"{count:,}" for count in samples)
        said.append(f"{Scale.of(report).head}, on {counts} samples, 95 % interval")
    latency = report["rows"][0].get("latency_ms", {}).get(runtime)
    if latency:
        shared = ", ".join(f"{key} {latency[key]}" for key in ("threads", "batch") if key in latency)
        said.append(f"median latency of one call{f' ({shared})' if shared else ''}")
    if deployed(report):
        said.append("bytes against the original's file of the same format")
    return "; ".join(said)


def cell(value: str, below: str = "", style: str = "") -> Text:
    """A value with a dim line under it."""
    text = Text(value, style=style)
    return text.append(f"\n{below}", style="dim") if below else text


def gain(change: Change | None) -> str:
    """Both ways; empty for next to nothing, which would only widen its column."""
    return both_ways(change.before, change.after) if change and abs(change.left - 1) > _NOTHING else ""


def score_cell(report: dict[str, Any], row: dict[str, Any], scale: Scale) -> Text:
    """The score, its interval and what is lost; a loss that is larger than the interval explains is red, a gain is
    green."""
    if row.get("score") is None:
        return cell("-")
    text = cell(scale.text(row["score"]), scale.span(row["score_interval"]) if row.get("score_interval") else "")
    lost = drop(report, row)
    if lost is None or row is report["rows"][0] or scale.same(report["rows"][0]["score"], row["score"]):
        return text
    style = "red" if surely_worse(report, row) else "green" if lost < 0 else ""
    return text.append(f"\n{scale.loss_number(abs(lost))} {'lost' if lost > 0 else 'gained'}", style=style)


def macs_cell(report: dict[str, Any], row: dict[str, Any]) -> Text:
    before, after = report["rows"][0].get("macs"), row.get("macs")
    below = both_ways(before, after) if before and after and before != after else ""
    return cell("-" if after is None else count_text(after), below)


def bytes_cell(report: dict[str, Any], row: dict[str, Any], kind: str) -> Text:
    size = row.get("file_bytes", {}).get(kind)
    if size is None:
        return cell("-")
    return cell(bytes_text(size), "" if row is report["rows"][0] else gain(size_change(report, row, kind)))


def latency_cell(report: dict[str, Any], row: dict[str, Any], runtime: str) -> Text:
    """Median, its interval and the gain. Slower beyond doubt is red, faster beyond doubt is green."""
    latency = row.get("latency_ms", {}).get(runtime)
    if not latency:
        return cell("-")
    span = milliseconds_span(latency["low"], latency["high"])
    if row is report["rows"][0]:
        return cell(milliseconds_text(latency["median"]), span)
    change = latency_change(report, row, runtime)
    style = "" if change is None else "red" if change.grew else "green" if change.shrank else ""
    value = cell(milliseconds_text(latency["median"]), span, style)
    return value.append(f"\n{said}", style="dim") if (said := gain(change)) else value
