"""docs/operators.md from the results of operators.py."""

from __future__ import annotations

from typing import Any


def page(log: dict[str, Any]) -> str:
    return "\n"
