"""Recipes: a chain of steps as plain, safe YAML, and back.

    schema: 1
    steps:
    - fold_batch_norm: {}
    - quantize: {weights: int8, activations: int8}

A recipe is data: it names steps of the one dictionary below and can import nothing. Steps of your own are passed in
Python: `Recipe.parse(text, steps={"mine": Mine})`.
"""

from __future__ import annotations

import difflib
import importlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Union

from tersenet import plain_yaml
from tersenet.errors import RecipeError, SettingsError, TersenetError
from tersenet.step import Chain, Companion, Step

SCHEMA = 1

# Every step and companion that a recipe can name, and the module that holds its class.
STEPS = {
    "binarise": "tersenet.quantization.binarise:Binarise",
    "chain": "tersenet.step:Chain",
    "drop_blocks": "tersenet.pruning.drop_blocks:DropBlocks",
    "fold_batch_norm": "tersenet.rewrite.fold_batch_norm:FoldBatchNorm",
    "prune_activations": "tersenet.pruning.prune_activations:PruneActivations",
    "prune_channels": "tersenet.pruning.prune_channels:PruneChannels",
    "prune_weights": "tersenet.pruning.prune_weights:PruneWeights",
    "quantize": "tersenet.quantization.quantize:Quantize",
    "quantize_aware": "tersenet.quantization.quantize_aware:QuantizeAware",
    "repeat": "tersenet.repeat:Repeat",
    "resize": "tersenet.resize:Resize",
    "rewind": "tersenet.pruning.rewind:Rewind",
    "search": "tersenet.search.search:Search",
    "settle": "tersenet.rewrite.settle:Settle",
    "share_weights": "tersenet.size.share_weights:ShareWeights",
    "shrink_file": "tersenet.size.shrink_file:ShrinkFile",
    "keep_grids": "tersenet.size.keep_grids:KeepGrids",
    "ternarise": "tersenet.quantization.ternarise:Ternarise",
    "train": "tersenet.train:Train",
}
COMPANIONS = {
    "activation_penalty": "tersenet.pruning.activation_penalty:ActivationPenalty",
    "freeze": "tersenet.quantization.freeze:Freeze",
    "group_lasso": "tersenet.pruning.penalties:GroupLasso",
    "keep_early": "tersenet.pruning.rewind:KeepEarly",
    "ramp": "tersenet.pruning.ramp:Ramp",
    "scale_penalty": "tersenet.pruning.penalties:ScalePenalty",
    "soft_targets": "tersenet.distill.soft_targets:SoftTargets",
}
# Recipes that can be named in place of a file.
NAMED = {"int8": "schema: 1\nsteps:\n- fold_batch_norm: {}\n- quantize: {weights: int8, activations: int8}\n"}
# YAML says `with`, which is a keyword in Python.
_SPELLING = {"with": "companions"}
# Words for truth values that YAML had once, where a truth value must stand.
_TRUTH = {"yes": True, "on": True, "no": False, "off": False}
_SPELLING_BACK = {python: written for written, python in _SPELLING.items()}

Own = Mapping[str, type[Step] | type[Companion]]


def step_class(name: str, steps: Own | None = None) -> Any:
    """The class of a step or companion by its name in recipes. Raises RecipeError listing the known ones."""
    own = steps or {}
    if name in own:
        return own[name]
    known = {**STEPS, **COMPANIONS}
    if name not in known:
        near = difflib.get_close_matches(name, [*known, *own], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"unknown step {name!r}{hint} (known: {', '.join(sorted([*known, *own]))})")
    module, _, attribute = known[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def step_of(name: str, settings: Mapping[str, Any]) -> Any:
    """A step by its name in recipes, from settings that are given in Python. Raises SettingsError as a recipe would."""
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    try:
        return _build({name: listed}, Step, None)
    except RecipeError as error:
        raise SettingsError(str(error)) from error


@dataclass(frozen=True)
class Recipe:
    """A list of steps that can be written down."""

    steps: tuple[Step, ...]

    @classmethod
    def read(cls, path: str | Path, steps: Own | None = None) -> Recipe:
        """Reads a YAML file, or one of the recipes in `NAMED` where there is no such file. Raises RecipeError, naming
        the file."""
        if str(path) in NAMED and not Path(path).exists():
            return cls.parse(NAMED[str(path)])
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            named = "" if Path(path).suffix else f"; recipes that need no file: {', '.join(NAMED)}"
            raise RecipeError(f"the recipe {path} cannot be read: {error.strerror or error}{named}") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"the recipe {path} is no text in UTF-8; give a YAML file") from error
        try:
            return cls.parse(text, steps)
        except TersenetError as error:
            raise RecipeError(f"{path}: {error}") from error

    @classmethod
    def parse(cls, text: str, steps: Own | None = None) -> Recipe:
        """Reads YAML text. Raises RecipeError."""
        try:
            data = plain_yaml.load(text)
        except ValueError as error:
            raise RecipeError(f"the recipe is {error}") from error
        if not isinstance(data, dict) or "steps" not in data:
            raise RecipeError("a recipe must be a mapping with 'schema: 1' and a list 'steps'")
        unknown = set(data) - {"schema", "steps"}
        if unknown:
            raise RecipeError(f"unknown key {sorted(unknown)[0]!r} in the recipe (known: schema, steps)")
        if data.get("schema", SCHEMA) != SCHEMA:
            raise RecipeError(f"the recipe has schema {data['schema']!r}; this version reads schema {SCHEMA}")
        if not isinstance(data["steps"], list) or not data["steps"]:
            raise RecipeError("'steps' must be a list with at least one step, such as '- quantize: {}'")
        return cls(tuple(_build(entry, Step, steps) for entry in data["steps"]))

    def dump(self) -> str:
        """The recipe as YAML, every setting written out, so that it replays exactly even if a default changes."""
        return plain_yaml.dump({"schema": SCHEMA, "steps": [_plain(step) for step in self.steps]})

    def brief(self) -> str:
        """The same for people: only what differs from the defaults of this version."""
        return plain_yaml.dump({"schema": SCHEMA, "steps": [_plain(step, brief=True) for step in self.steps]})

    def chain(self) -> Chain:
        return Chain(steps=self.steps)


def _plain(part: Step | Companion, brief: bool = False) -> dict[str, Any]:
    """One step as {name: settings} of plain YAML types. Empty `only` and `skip` are left out.

    Args:
        brief: whether settings at their defaults are left out, too.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Step | Companion):
            return _plain(value, brief)
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise RecipeError(f"{part.name} has a setting that cannot be written down: {value!r}")

    settings = {
        _SPELLING_BACK.get(key, key): plain(value)
        for key, value in part.settings().items()
        if not (key in ("only", "skip") and value == ()) and not (brief and _is_default(part, key, value))
    }
    return {part.name: settings}


def _is_default(part: Step | Companion, key: str, value: Any) -> bool:
    """Whether a setting has the value that it would have if nobody had written it."""
    known = {field.name: field for field in fields(part)}
    if key not in known:
        return False
    field = known[key]
    made = field.default_factory() if field.default_factory is not MISSING else field.default
    return made is not MISSING and type(value) is type(made) and value == made


def _build(entry: Any, kind: type, own: Own | None) -> Any:
    """{name: settings}, or a bare name, as a step or companion."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise RecipeError(f"a step must be written as '- name: {{settings}}', got {entry!r}")
    name, settings = next(iter(entry.items()))
    cls = step_class(str(name), own)
    if not issubclass(cls, kind):
        raise RecipeError(
            f"{name!r} is a {'companion' if issubclass(cls, Companion) else 'step'} and cannot stand here"
        )
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise RecipeError(f"the settings of {name!r} must be a mapping, got {settings!r}; write '{name}: {{}}'")
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in fields(cls)}
    values = {}
    for key, value in settings.items():
        field = _SPELLING.get(key, key)
        if field not in known or key in _SPELLING_BACK:
            names = [_SPELLING_BACK.get(known_name, known_name) for known_name in known]
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"{name!r} has no setting {key!r}{hint} (known: {', '.join(names)})")
        values[field] = _value(f"{name}.{key}", hints[field], value, own)
    missing = [
        field.name
        for field in known.values()
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise RecipeError(f"{name!r} needs the setting {missing[0]!r}")
    try:
        return cls(**values)
    except TersenetError as error:
        raise RecipeError(f"{name}: {error}") from error


def _value(where: str, hint: Any, value: Any, own: Own | None) -> Any:
    """A YAML value as the type that the field's annotation asks for. Raises RecipeError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return _value(where, option, value, own)
            except RecipeError:
                continue
    elif origin is tuple and isinstance(value, list):
        inner = args[0] if args else Any
        return tuple(_value(f"{where}[{i}]", inner, item, own) for i, item in enumerate(value))
    elif origin is Sequence and isinstance(value, list):
        return [_value(f"{where}[{i}]", args[0], item, own) for i, item in enumerate(value)]
    elif origin is Mapping and isinstance(value, dict):
        return {
            _value(f"{where}: key {key!r}", args[0], key, own): _value(f"{where}.{key}", args[1], item, own)
            for key, item in value.items()
        }
    elif origin is typing.Literal:
        if value in args:
            return value
        raise RecipeError(f"{where} is {value!r}; allowed: {', '.join(map(str, args))}")
    elif hint is Any:
        return value
    elif isinstance(hint, type) and issubclass(hint, Step | Companion):
        return _build(value, hint, own)
    elif hint is type(None) and value is None:
        return None
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if value != value:
            raise RecipeError(f"{where} is not a number (.nan); give one")
        return float(value)
    elif hint is bool and isinstance(value, str) and value.lower() in _TRUTH:
        return _TRUTH[value.lower()]
    elif isinstance(hint, type) and isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    wanted = getattr(hint, "__name__", None) if origin is None else str(hint).replace("typing.", "")
    raise RecipeError(f"{where} is {value!r} ({type(value).__name__}); it must be {wanted}")
