"""YAML as people read it: numbers, truth values and words as in YAML 1.2, and every key once.

PyYAML reads YAML 1.1, where `1e-3` is a word, `010` is 8, `1:30` is 90, `on` is true, a date is no word, and the second
of two equal keys silently wins. Recipes are read by the core schema of YAML 1.2 (yaml.org/spec/1.2.2, section 10.3)
instead, without its octal and hexadecimal numbers.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_NUMBERS = {
    "tag:yaml.org,2002:bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "tag:yaml.org,2002:int": (r"^[-+]?[0-9]+$", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
}
_REPLACED = (*_NUMBERS, "tag:yaml.org,2002:timestamp")


def _resolvers() -> dict[Any, list[Any]]:
    """By the first letter of a word: what it may be. Shared by reading and writing, so that words stay words."""
    found = {
        letter: [(tag, pattern) for tag, pattern in entries if tag not in _REPLACED]
        for letter, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for tag, (pattern, letters) in _NUMBERS.items():
        for letter in letters:
            found.setdefault(letter, []).append((tag, re.compile(pattern)))
    return found


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Refuses a key that is there twice."""
        seen: dict[Any, Any] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands here a second time", key.start_mark
                )
            seen[key.value] = key
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: _float(node.value))


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers()


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def load(text: str) -> Any:
    """Plain data from YAML text. Raises ValueError in one sentence, with the line."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error)
        if "'\\t'" in problem:
            problem = "a tab stands where only spaces may indent"
        raise ValueError(f"not valid YAML{where}: {problem}") from error


def dump(data: Any) -> str:
    """YAML text that `load` reads back equal."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)
