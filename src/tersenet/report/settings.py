"""Which settings of a run a reader must see: those that differ from the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Those of `compress`; a test holds the two together.
DEFAULTS: dict[str, Any] = {"runtimes": ["onnxruntime"], "threads": 1, "batch": 1, "max_drop": None, "seed": 0}
# What a run is of, which no default stands for, and what it was aimed at.
_ALWAYS = ("model", "data", "latency", "bytes", "macs", "memory")


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(those that differ from the defaults, the rest), without what the page shows in sections of its own."""
    plain = {key: value for key, value in settings.items() if not isinstance(value, Mapping) and value is not None}
    named = {key: plain[key] for key in _ALWAYS if key in plain}
    changed = {key: value for key, value in plain.items() if key in DEFAULTS and value != DEFAULTS[key]}
    shown = named | changed
    return shown, {key: value for key, value in plain.items() if key not in shown}
