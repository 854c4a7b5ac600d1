"""Checks a value against schema.json, which is the one place that says what a report looks like.

Only the part of JSON Schema (draft 2020-12) that schema.json uses is read here, so that the core needs no further
package; the tests hold it against the `jsonschema` package. Two departures: a number must be finite, and 1.0 does not
pass for an integer.
"""

from __future__ import annotations

import math
from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
KEYWORDS = {
    *("$schema", "$id", "$defs", "$ref", "title", "description", "type", "const", "required", "properties"),
    *("additionalProperties", "items", "minItems", "maxItems", "minLength", "maxLength", "minimum", "maximum"),
}


def faults(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str = "report") -> list[str]:
    """What is wrong with a value, each as "place: what it is, what is allowed"; empty when nothing is.

    Args:
        value: parsed JSON.
        schema: the rule for this value.
        root: the whole schema, where "#/$defs/NAME" is looked up.
        where: the place of the value, for the messages.
    """
    if "$ref" in schema:
        return faults(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, where)
    if "const" in schema and (value != schema["const"] or isinstance(value, bool)):
        return [f"{where} is {shown(value)} and must be {schema['const']!r}"]
    kinds = schema.get("type", list(TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(is_kind(value, kind) for kind in kinds):
        return [f"{where} is {shown(value)} and must be of type {' or '.join(kinds)}"]
    if isinstance(value, dict):
        return object_faults(value, schema, root, where)
    if isinstance(value, list):
        inner = schema.get("items", {})
        found = [fault for i, item in enumerate(value) for fault in faults(item, inner, root, f"{where}[{i}]")]
        return bounds(len(value), schema.get("minItems"), schema.get("maxItems"), f"the length of {where}") + found
    if isinstance(value, str):
        return bounds(len(value), schema.get("minLength"), schema.get("maxLength"), f"the length of {where}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return bounds(value, schema.get("minimum"), schema.get("maximum"), where)
    return []


def object_faults(value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any], where: str) -> list[str]:
    """What is wrong with an object: keys that are missing, keys that are not known, and its values."""
    known, other = schema.get("properties", {}), schema.get("additionalProperties", {})
    found = [f"{where} has no {key!r}" for key in schema.get("required", []) if key not in value]
    for key, item in value.items():
        if key not in known and other is False:
            found.append(f"{where} has the unknown key {key!r} (known: {', '.join(known)})")
        else:
            found += faults(item, known.get(key, other), root, f"{where}.{key}")
    return found


def is_kind(value: Any, kind: str) -> bool:
    """Whether a value is of a JSON type. In JSON true is no number, and neither is NaN."""
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, TYPES[kind])


def bounds(value: float, low: float | None, high: float | None, where: str) -> list[str]:
    if low is not None and value < low:
        return [f"{where} is {value} and must be at least {low}"]
    if high is not None and value > high:
        return [f"{where} is {value} and must be at most {high}"]
    return []


def shown(value: Any) -> str:
    """A value, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
