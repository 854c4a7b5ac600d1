"""A profile for a terminal, and the profiles of several runtimes beside each other.

One profile takes at most 100 columns. A terminal of fewer (80, or a pipe) gets no columns for the kind and the
intensity; the names then say the kind where there is no other name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tersenet.deploy.machine import roofline_line
from tersenet.report.words import bytes_text, count_text, runtime_name

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

_MARKED = 3  # so many of the slowest rows stand out in the table
_NAME, _KIND = 22, 14
_WIDE = 98
_FIRST, _EACH = 45, 21  # columns of several profiles: before the runtimes, and for each


class ProfileTable:
    """One profile, to be printed by rich: its rows, what they were measured on, and advice; the slowest stand out.

    Layers without multiply-adds that take no time of their own are left out, and counted below.

    Args:
        found: of `tersenet.deploy.profile`, with or without what `tersenet.deploy.causes.explained` adds.
    """

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found = found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        shown = [row for row in self.found["rows"] if row["ms"] is not None or row["macs"]]
        yield _one(self.found, shown, wide=options.max_width >= _WIDE)
        yield _below(self.found, len(self.found["rows"]) - len(shown))


class ProfilesTable:
    """Several profiles of one model: the milliseconds of each row, then under the runtime's name what limits it there.

    Args:
        profiles: as in `ProfileTable`.
    """

    def __init__(self, profiles: Sequence[Mapping[str, Any]]) -> None:
        self.profiles = profiles

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        yield _several(self.profiles, wide=options.max_width >= _FIRST + _EACH * len(self.profiles))
        for found in self.profiles:
            yield _below(found, 0)


def _one(found: Mapping[str, Any], shown: Sequence[Mapping[str, Any]], wide: bool) -> Table:
    from rich.text import Text

    totals = found["totals"]
    slowest = sorted(shown, key=lambda row: -row["share"])[:_MARKED]
    titles = [("MACs", count_text(totals["macs"])), ("moved", bytes_text(totals["bytes_moved"]))]
    titles += [("FLOP/B", _number(totals["intensity"]))] if wide else []
    titles += [("ms", f"{totals['ms']:.3f}"), ("time", "100 %")]
    table = _table(len(found["rows"]), wide)
    for title, foot in titles:
        table.add_column(title, foot, justify="right", no_wrap=True)
    limited = "causes" in found
    if limited:
        table.add_column("roof", justify="right", no_wrap=True)
        table.add_column("limited by", no_wrap=True)
    for row in shown:
        cells = [count_text(row["macs"]), bytes_text(row["bytes_moved"])] if row["layer"] else [""] * 2
        cells += [_number(row["intensity"]) if row["layer"] else ""] if wide else []
        cells += ["-", ""] if row["ms"] is None else [f"{row['ms']:.3f}", f"{100 * row['share']:.1f} %"]
        if limited:
            cells += ["" if row["of_roof"] is None else f"{100 * row['of_roof']:.0f} %", row["cause"] or ""]
        costly = any(row is other for other in slowest)
        style = "bold yellow" if costly else "" if row["layer"] else "dim"
        table.add_row(*map(Text, (*_names(row, wide), *cells)), style=style)
    return table


def _several(profiles: Sequence[Mapping[str, Any]], wide: bool) -> Table:
    from rich.text import Text

    keyed = [{(row["path"], row["kind"]): row for row in found["rows"]} for found in profiles]
    shown: dict[tuple[str, str], Mapping[str, Any]] = {}
    for each in keyed:
        for key, row in each.items():
            if row["ms"] is not None or row["macs"]:
                shown.setdefault(key, row)
    table = _table(len(shown), wide)
    table.add_column("MACs", count_text(profiles[0]["totals"]["macs"]), justify="right", no_wrap=True)
    for found in profiles:
        table.add_column("ms", f"{found['totals']['ms']:.3f}", justify="right", no_wrap=True, min_width=7)
        table.add_column(runtime_name(found["runtime"]), no_wrap=True)
    for key, row in shown.items():
        cells = [count_text(row["macs"]) if row["layer"] else ""]
        for each in keyed:
            here = each.get(key, {"ms": None})
            timed = here["ms"] is not None
            cells += [f"{here['ms']:.3f}", here.get("cause") or ""] if timed else ["-", ""]
        table.add_row(*map(Text, (*_names(row, wide), *cells)), style="" if row["layer"] else "dim")
    return table


def _table(rows: int, wide: bool) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, show_footer=True)
    table.add_column("layer", f"{rows} rows", no_wrap=True)
    if wide:
        table.add_column("kind", no_wrap=True)
    return table


def _names(row: Mapping[str, Any], wide: bool) -> list[str]:
    if wide:
        name = row["path"] or ("(model)" if row["layer"] else f"(no layer, {row['calls']} x)")
        return [_shortened(name, _NAME), _shortened(row["kind"], _KIND)]
    operator = not row["path"] or row["kind"][0].islower()
    name = f"{row['path']} {row['kind']}".strip() if operator else row["path"]
    return [_shortened(name if row["layer"] else f"({name}, {row['calls']} x)", _NAME)]


def _below(found: Mapping[str, Any], hidden: int) -> Any:
    from rich.text import Text

    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    lines = [
        f"{runtime_name(found['runtime'])}, {threads}, batch {found['batch']}, {found['machine']['cpu']}; "
        f"{count_text(found['totals']['params'])} parameters",
        f"latency of the model {_span(found['latency_ms'])} ms, under the profiler "
        f"{_span(found['profiled_latency_ms'])} ms; sum of the rows {found['totals']['ms']:.3f} ms",
    ]
    lines += [found["disagreement"]] if found.get("disagreement") else []
    lines.append("MACs, bytes moved and FLOPs per byte are for one sample, without a cache")
    if hidden:
        lines.append(
            f"left out: {hidden} {'row' if hidden == 1 else 'rows'} without MACs or time of their own (folded, fused)"
        )
    if "roofline" in found:
        lines.append(roofline_line(found["roofline"]))
        lines += ["", *found["advice"]]
    return Text("\n".join([*lines, ""]))


def _span(latency: Mapping[str, Any]) -> str:
    return f"{latency['median']:.3f} [{latency['low']:.3f}, {latency['high']:.3f}]"


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _shortened(text: str, width: int) -> str:
    """The end says which layer it is; the beginning is shared by many."""
    return text if len(text) <= width else "…" + text[1 - width :]
