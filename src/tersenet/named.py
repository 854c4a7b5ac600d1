"""Layers as settings name them: every name must be one that the model has, else it is refused with the nearest ones.

A pattern is a path, a path with wildcards, or a type. A name that says nothing about any layer would leave a step to do
less, or more, than was asked for, without a word.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

from torch import nn

from tersenet.errors import SettingsError

_NO_LAYERS = ("torch.nn.modules.module", "torch.nn.modules.container")  # what only holds others
# What was found in the model that a chain began with; its steps may take layers away that a later one names.
_FOUND: ContextVar[frozenset[str]] = ContextVar("patterns found before", default=frozenset())


class Namer(Protocol):
    """A step or companion whose settings name layers."""

    @property
    def name(self) -> str: ...

    def names(self) -> dict[str, tuple[str, ...]]: ...

    def can_name(self, module: nn.Module) -> bool: ...


def hits(pattern: str, path: str, module: nn.Module) -> bool:
    """Whether a pattern is about this layer."""
    return pattern.lower() in kinds_of(module) or path == pattern or fnmatch.fnmatchcase(path, pattern)


def kinds_of(module: nn.Module) -> set[str]:
    """Names of a module's type and of those that it is derived from, in lower case."""
    return {cls.__name__.lower() for cls in type(module).__mro__ if issubclass(cls, nn.Module)}


def type_of(module: nn.Module) -> str:
    """The name of a module's type, as whoever wrote the model knows it: not of what torch derives for masks."""
    return next(cls.__name__ for cls in type(module).__mro__ if cls.__module__ != "torch.nn.utils.parametrize")


def holds_layers(module: nn.Module) -> bool:
    """Whether a module has layers inside; what torch attaches to compute a weight, as for masks, is none."""
    return any(name != "parametrizations" for name, _ in module.named_children())


def is_layer(module: nn.Module) -> bool:
    """Whether a module does something itself, and does not only hold others: one of torch.nn may do both, such as an
    attention or a batch norm that holds its activation. A block with a parameter of its own is none, since no step
    takes what it says of a block for the layers in it."""
    if not holds_layers(module):
        return True
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return (bool(own) or "parametrizations" in module._modules) and any(
        cls.__module__.startswith("torch.nn.modules") and cls.__module__ not in _NO_LAYERS
        for cls in type(module).__mro__
    )


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module, of all that settings may be about; masks and what else is attached to a layer are part of it."""
    return {path: it for path, it in model.named_modules() if "parametrizations" not in path.split(".")}


def check_names(step: Namer, model: nn.Module) -> list[str]:
    """What is to be said of names that only an earlier model had, in a step's settings and in its companions'.

    Raises:
        SettingsError: on a name that is no layer's, with the nearest ones.
    """
    said: list[str] = []
    for companion in getattr(step, "companions", ()):
        try:
            said += check_names(companion, model)
        except SettingsError as error:
            raise SettingsError(f"{companion.name}: {error}") from None
    for setting, patterns in step.names().items():
        for pattern in patterns:
            if _has(step, setting, pattern, model):
                continue
            if pattern not in _FOUND.get():
                raise SettingsError(_refusal(step, setting, pattern, model))
            said.append(f"{step.name}: {setting} names {pattern!r}, which an earlier step took out of the model")
    return said


@contextlib.contextmanager
def remembering(steps: Iterable[Any], model: nn.Module) -> Iterator[None]:
    """While it is open, names that this model has may be missing in what the steps make of it."""
    found = {
        pattern
        for step in _all(steps)
        for part in (step, *getattr(step, "companions", ()))
        for setting, patterns in part.names().items()
        for pattern in patterns
        if _has(part, setting, pattern, model)
    }
    token = _FOUND.set(_FOUND.get() | found)
    try:
        yield
    finally:
        _FOUND.reset(token)


def foresee_names(steps: Sequence[Any], model: nn.Module) -> None:
    """Checks the names of steps that have not run yet, and of those that they hold, by the model that they begin with.

    Behind a step that makes layers of new paths or types, names can be checked only when it has run.

    Raises:
        SettingsError: naming the step.
    """
    for step in _all(steps):
        try:
            check_names(step, model)
        except SettingsError as error:
            raise SettingsError(f"{step.name}: {error}") from None
        if getattr(step, "makes_layers", False):
            return


def _all(steps: Iterable[Any]) -> Iterator[Any]:
    """Steps, each before those that it holds."""
    for step in steps:
        yield step
        yield from _all(getattr(step, "steps", ()))


def _has(step: Namer, setting: str, pattern: str, model: nn.Module) -> bool:
    if any(hits(pattern, path, module) and step.can_name(module) for path, module in _named(model).items()):
        return True
    # Channels can also be those of a parameter outside of layers, which is named by itself.
    return setting not in ("only", "skip") and pattern in dict([*model.named_parameters(), *model.named_buffers()])


def _refusal(step: Namer, setting: str, pattern: str, model: nn.Module) -> str:
    here = _named(model)
    if any(hits(pattern, path, module) for path, module in here.items()):
        inside = pattern in here and any(path.startswith(f"{pattern}.") for path in here)
        advice = f"write '{pattern}.*' for all of them" if inside else "name the layers in it"
        return f"{setting} names {pattern!r}, which holds layers and is none itself; {advice}"
    known = [path for path, module in here.items() if path and step.can_name(module)]
    kinds = dict.fromkeys(type_of(here[path]) for path in known)
    near = _near(pattern, [*known, *kinds])
    return f"{setting} names {pattern!r}, and no layer of this model is called that or is of that type; {near}"


def _near(pattern: str, known: Sequence[str]) -> str:
    by_lower = {name.lower(): name for name in reversed(known)}
    close = [by_lower[name] for name in difflib.get_close_matches(pattern.lower(), by_lower, 3)]
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are {', '.join(known[:5])}{f' and {len(known) - 5} more' if len(known) > 5 else ''}"
