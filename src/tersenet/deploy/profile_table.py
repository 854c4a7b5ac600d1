"""A profile for a terminal, at most 100 columns wide; and the profiles of several runtimes beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tersenet.deploy.machine import roofline_line
from tersenet.report.words import bytes_text, count_text, runtime_name

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

_MARKED = 3  # so many of the slowest rows stand out in the table
_NAME, _KIND = 22, 14


def profile_table(found: dict[str, Any]) -> Group:
    """One profile: its rows, what they were measured on, and advice; the slowest rows stand out.

    Layers without multiply-adds that take no time of their own are left out, and counted below.

    Args:
        found: of `tersenet.deploy.profile`, with or without what `tersenet.deploy.causes.explained` adds.
    """
    from rich.console import Group
    from rich.text import Text

    rows, totals = found["rows"], found["totals"]
    shown = [row for row in rows if row["ms"] is not None or row["macs"]]
    slowest = sorted(shown, key=lambda row: -row["share"])[:_MARKED]
    limited = "causes" in found
    table = _table(len(rows))
    feet = [count_text(totals["macs"]), bytes_text(totals["bytes_moved"])]
    feet += [_number(totals["intensity"]), f"{totals['ms']:.3f}", "100 %"]
    for title, foot in zip(("MACs", "moved", "FLOP/B", "ms", "time"), feet, strict=True):
        table.add_column(title, foot, justify="right", no_wrap=True)
    if limited:
        table.add_column("roof", justify="right", no_wrap=True)
        table.add_column("limited by", no_wrap=True)
    for row in shown:
        cells = [""] * 3
        if row["layer"]:
            cells = [count_text(row["macs"]), bytes_text(row["bytes_moved"]), _number(row["intensity"])]
        cells += ["-", ""] if row["ms"] is None else [f"{row['ms']:.3f}", f"{100 * row['share']:.1f} %"]
        if limited:
            cells += ["" if row["of_roof"] is None else f"{100 * row['of_roof']:.0f} %", row["cause"] or ""]
        costly = any(row is other for other in slowest)
        style = "bold yellow" if costly else "" if row["layer"] else "dim"
        table.add_row(*_names(row), *map(Text, cells), style=style)
    return Group(table, *_below(found, len(rows) - len(shown)))


def profiles_table(profiles: Sequence[dict[str, Any]]) -> Group:
    """Several profiles of one model: the milliseconds of each row in each runtime, and what limits it there."""
    from rich.console import Group
    from rich.text import Text

    keyed = [{(row["path"], row["kind"]): row for row in found["rows"]} for found in profiles]
    rows = {key: row for each in reversed(keyed) for key, row in each.items() if row["ms"] is not None or row["macs"]}
    order = [key for each in keyed for key in each if key in rows]
    table = _table(len(rows))
    table.add_column("MACs", count_text(profiles[0]["totals"]["macs"]), justify="right", no_wrap=True)
    for found in profiles:
        table.add_column(f"{runtime_name(found['runtime'])} ms", f"{found['totals']['ms']:.3f}", justify="right")
        table.add_column("limited by", no_wrap=True)
    for key in dict.fromkeys(order):
        cells = [count_text(rows[key]["macs"]) if rows[key]["layer"] else ""]
        for each in keyed:
            row = each.get(key)
            timed = row is not None and row["ms"] is not None
            cells += [f"{row['ms']:.3f}" if row and timed else "-", (row.get("cause") or "") if row and timed else ""]
        table.add_row(*_names(rows[key]), *map(Text, cells), style="" if rows[key]["layer"] else "dim")
    below = [part for found in profiles for part in _below(found, 0)]
    return Group(table, *below)


def _table(rows: int) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_footer=True)
    table.add_column("layer", f"{rows} rows", no_wrap=True, min_width=16)
    table.add_column("kind", no_wrap=True)
    return table


def _names(row: dict[str, Any]) -> tuple[Text, Text]:
    from rich.text import Text

    name = row["path"] or ("(model)" if row["layer"] else f"(no layer, {row['calls']} x)")
    return Text(_shortened(name, _NAME)), Text(_shortened(row["kind"], _KIND))


def _below(found: dict[str, Any], hidden: int) -> list[Text]:
    from rich.text import Text

    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    lines = [
        f"{runtime_name(found['runtime'])}, {threads}, batch {found['batch']}, {found['machine']['cpu']}; "
        f"{count_text(found['totals']['params'])} parameters",
        f"latency of the model {_span(found['latency_ms'])} ms, under the profiler "
        f"{_span(found['profiled_latency_ms'])} ms; sum of the rows {found['totals']['ms']:.3f} ms",
        "MACs, bytes moved and FLOPs per byte are for one sample, without a cache",
    ]
    if hidden:
        lines.append(
            f"left out: {hidden} {'row' if hidden == 1 else 'rows'} without MACs or time of their own (folded, fused)"
        )
    if "roofline" in found:
        lines.append(roofline_line(found["roofline"]))
        lines += ["", *found["advice"]]
    return [Text(line) for line in [*lines, ""]]


def _span(latency: dict[str, Any]) -> str:
    return f"{latency['median']:.3f} [{latency['low']:.3f}, {latency['high']:.3f}]"


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _shortened(text: str, width: int) -> str:
    """The end says which layer it is; the beginning is shared by many."""
    return text if len(text) <= width else "…" + text[1 - width :]
