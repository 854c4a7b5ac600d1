"""docs/operators.md from the results of operators.py."""

from __future__ import annotations

from typing import Any

_CHECKS = ("captured", "cut", "terse", "pt2", "onnx", "int8")


def page(log: dict[str, Any]) -> str:
    """docs/operators.md: one line per setting, then what is left out and why."""
    lines = [
        "# Operators",
        "",
        "Made by `python benchmarks/operators.py`, which says what each column is.",
        "",
        "| operator | " + " | ".join(_CHECKS) + " |",
        "|---" * (len(_CHECKS) + 1) + "|",
    ]
    for key, row in log["rows"].items():
        cells = [row["left_out"]] if "left_out" in row else [_said(row.get(check)) for check in _CHECKS]
        lines.append("| " + " | ".join(_cell(text) for text in (f"`{key}`", *cells)) + " |")
    lines += ["", "## What does not stand in a network", "", "| operator | why |", "|---|---|"]
    lines += [f"| `{name}` | {_cell(why)} |" for name, why in log["left_out"].items()]
    return "\n".join(lines) + "\n"


def _said(result: Any) -> str:
    if isinstance(result, dict):
        return "; ".join(f"{runtime}: {said}" for runtime, said in result.items() if said != "ok") or "ok"
    return result or "not tried"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
