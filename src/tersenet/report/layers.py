"""The table of layers on the page: those that hold parameters or compute, largest first where there are very many."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from tersenet.report.words import bytes_text

# More rows than these would make a page of megabytes that nobody reads to its end.
SHOWN = 200
_COUNTED = ("params", "macs", "bytes")


@dataclass(frozen=True)
class LayerTable:
    """Rows of the layers of what ships, and what is not among them.

    Args:
        rows: {"path", "kind", "params", "macs", "bytes", "note", "share", "bytes_left"}; share is of all multiply-adds.
        empty: how many layers have neither parameters nor multiply-adds, in words; empty where there are none.
        smaller: how many more layers there are, in words; empty where all are shown.
        notes: whether any row has a note.
    """

    rows: list[dict[str, Any]]
    empty: str
    smaller: str
    notes: bool


def layer_table(report: dict[str, Any]) -> LayerTable | None:
    """The layers of the last row that lists some; None where no row does."""
    listed: list[dict[str, Any]] = next((row["layers"] for row in reversed(report["rows"]) if row.get("layers")), [])
    if not listed:
        return None
    known = [layer for layer in listed if not _is_empty(layer)]
    before = {layer["path"]: layer for layer in report["rows"][0].get("layers", [])}
    total = sum(layer.get("macs", 0) for layer in known)
    largest = sorted(known, key=lambda layer: (layer.get("macs", 0), layer.get("bytes", 0)), reverse=True)[:SHOWN]
    shown = known if len(known) <= SHOWN else largest
    rows = [
        {
            **{key: layer.get(key) for key in ("path", "kind", *_COUNTED)},
            "note": layer.get("note", ""),
            "share": layer.get("macs", 0) / total if total else None,
            "bytes_left": _left(before.get(layer["path"], {}).get("bytes"), layer.get("bytes")),
        }
        for layer in shown
    ]
    return LayerTable(rows, _empty(listed), _smaller(known, shown), any(row["note"] for row in rows))


def _is_empty(layer: dict[str, Any]) -> bool:
    """Whether a layer has neither parameters nor multiply-adds; where these are not counted, that is not known."""
    counted = [layer[key] for key in ("params", "macs") if key in layer]
    return bool(counted) and not any(counted) and not layer.get("note")


def _empty(listed: list[dict[str, Any]]) -> str:
    kinds = Counter(layer.get("kind") or "other" for layer in listed if _is_empty(layer))
    count = sum(kinds.values())
    if not count:
        return ""
    some = ", ".join(f"{kind} {number}" for kind, number in kinds.most_common(6))
    more = f", {len(kinds) - 6} more kinds" if len(kinds) > 6 else ""
    held = sum(layer.get("bytes", 0) for layer in listed if _is_empty(layer))
    steps = f", {bytes_text(held)} in all" if held else ""
    return f"Not listed: {count} layer{'s' * (count > 1)} without parameters and multiply-adds ({some}{more}{steps})."


def _smaller(known: list[dict[str, Any]], shown: list[dict[str, Any]]) -> str:
    rest = len(known) - len(shown)
    if not rest:
        return ""
    share = 1 - sum(layer.get("macs", 0) for layer in shown) / max(1, sum(layer.get("macs", 0) for layer in known))
    return f"The {len(shown)} largest; {rest} more with {100 * share:.1f} % of the multiply-adds are in report.json."


def _left(before: float | None, after: float | None) -> float | None:
    return None if not before or after is None else after / before
