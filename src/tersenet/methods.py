"""What `tersenet methods` prints: every step and companion with what it serves and needs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from tersenet.recipe import COMPANIONS, STEPS, step_class

if TYPE_CHECKING:
    from rich.console import RenderableType


def known_methods() -> list[dict[str, Any]]:
    """Each step and companion as plain data: name, family, summary, layer types, needs, settings with defaults."""
    found = []
    for name in (*STEPS, *COMPANIONS):
        cls = step_class(name)
        settings = {
            "with" if field.name == "companions" else field.name: _default(field)
            for field in dataclasses.fields(cls)
            if field.init
        }
        entry = {
            "name": name,
            "kind": "step" if name in STEPS else "companion",
            "summary": cls.summary,
            "settings": settings,
        }
        if name in STEPS:
            entry |= {
                "family": cls.family,
                "serves": list(cls.serves),
                "needs": cls.needs,
                "needs_trained": cls.needs_trained,
                "special_runtime": cls.special_runtime,
                "changes_structure": cls.changes_structure,
            }
        found.append(entry)
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return list(field.default) if isinstance(field.default, tuple) else field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return list(value) if isinstance(value, tuple) else value
    return None


def methods_list(found: list[dict[str, Any]]) -> RenderableType:
    """The same for a terminal."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    shown: list[RenderableType] = []
    for entry in found:
        settings = ", ".join(
            f"{key}={value}" for key, value in entry["settings"].items() if key not in ("only", "skip")
        )
        if entry["kind"] == "companion":
            what = "companion of train"
        else:
            served = ", ".join(entry["serves"]) or "any layer"
            what = f"{entry['family']}; serves {served}; data needed: {entry['needs']}"
        shown.append(Text(entry["name"], style="bold").append(f"  ({what})", style="not bold dim"))
        shown.append(Padding(Text(entry["summary"]), (0, 0, 0, 4)))
        if settings:
            shown.append(Padding(Text(settings, style="dim"), (0, 0, 0, 4)))
    shown.append(Text("\nEvery step also takes only and skip: layer paths with * or layer types."))
    return Group(*shown)
