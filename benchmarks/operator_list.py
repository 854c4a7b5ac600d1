"""The list behind the operator table: what torch itself names, and the settings that each name is tried with.

The list is torch's own: the classes of torch.nn, the functions of torch.nn.functional, and what torch.overrides says
can be overridden. What is tried with each is in operator_settings.py, and so are the reasons of what is left out.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from operator_settings import FUNCTIONS, LAYERS, LEFT_OUT
from torch import Tensor, nn
from torch.overrides import get_ignored_functions, get_overridable_functions


@dataclass(frozen=True)
class Setting:
    """One operator with one setting: `call` is the expression, `layer` what the constructor takes."""

    name: str  # "nn.Conv2d", "F.pad", "torch.add", "Tensor.add_"
    said: str
    source: str
    call: str
    layer: str | None = None
    function: Any = field(default=None, compare=False)

    @property
    def key(self) -> str:
        return f"{self.name}({self.said}) @{self.source}"


def names() -> dict[str, Any]:
    """Everything that torch lists, "nn.Conv2d" -> what it is. Methods that are the same function are one."""
    found: dict[str, Any] = {
        f"nn.{name}": kind
        for name, kind in sorted(vars(nn).items())
        if isinstance(kind, type) and issubclass(kind, nn.Module)
    }
    for name, value in sorted(vars(F).items()):
        if inspect.isroutine(value) and not name.startswith("_") and torch.is_tensor is not value:
            found[f"F.{name}"] = value
    own = {"torch.nn.functional", "torch.functional", "torch.Tensor"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        listed = get_overridable_functions()
    for space, functions in listed.items():
        prefix = getattr(space, "__name__", "Tensor")
        prefix = "Tensor" if space is Tensor else "torch" if prefix in own else prefix
        if space is F or not (inspect.ismodule(space) or space is Tensor):
            continue
        for function in functions:
            name = getattr(function, "__name__", "")
            if name and name not in ("__get__", "__set__", "__delete__"):
                short = re.sub(r"^(linalg|special|fft)_", "", name) if prefix.count(".") else name
                found[f"{prefix}.{short}"] = function
    for name in ("T", "mT", "H", "mH", "real", "imag", "shape", "dtype", "device"):
        found[f"Tensor.{name}"] = functools.partial(lambda x, attribute: getattr(x, attribute), attribute=name)
    ignored = get_ignored_functions()
    for name, value in sorted(vars(torch).items()):
        if not name.startswith("_") and inspect.isbuiltin(value) and value in ignored:
            found.setdefault(f"torch.{name}", value)
    return found


def base(name: str) -> str:
    """The name that settings go by: `Tensor.add_`, `torch.add` and `Tensor.__add__` are `add`."""
    space, _, short = name.rpartition(".")
    if re.fullmatch(r"__(bool|float|int|long|index|array|contains|deepcopy|complex|array_wrap)__", short):
        return short
    prefix = {"torch.linalg": "linalg_", "torch.special": "special_", "torch.fft": "fft_"}.get(space, "")
    return prefix + short.strip("_")


def left_out(name: str) -> str | None:
    """Why an operator does not stand in a network."""
    short = base(name)
    known = parsed(LAYERS) if name.startswith("nn.") else parsed(FUNCTIONS)
    if short in known or name.rpartition(".")[2] in known:
        return None
    for pattern, why in LEFT_OUT.items():
        if re.fullmatch(pattern, short):
            return why
    return None


@functools.cache
def parsed(table: str) -> dict[str, list[tuple[str, str]]]:
    """name -> (source, setting)s."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in table.strip().splitlines():
        head, _, said = line.partition(": ")
        words = head.rstrip(":").split()
        source = next((word[1:] for word in words if word.startswith("@")), "")
        for name in [word for word in words if not word.startswith("@")]:
            found.setdefault(name, []).extend((source, one.strip()) for one in said.split(" | "))
    return found


def settings(name: str, function: Any) -> list[Setting]:
    """What is tried with one operator."""
    short = base(name)
    digit = {"1": "sequence", "3": "volume"}
    guess = next((digit[d] for d in re.findall(r"(\d)d", short) if d in digit), "image")
    table = parsed(LAYERS) if name.startswith("nn.") else parsed(FUNCTIONS)
    plain = name.rpartition(".")[2]
    tries = (short, plain) if "." in name.rpartition(".")[0] else (plain, short)
    given = next((table[word] for word in (*tries, short.removeprefix("special_")) if word in table), [("", "")])
    found = []
    for source, said in given:
        if name.startswith("nn."):
            layer, _, call = said.partition("=>")
            found.append(Setting(name, said, source or guess, call.strip() or "f(x)", layer.strip(), function))
        else:
            call = said[1:] if said.startswith("=") else f"f(x, {said})" if said else "f(x)"
            found.append(Setting(name, said, source or guess, call, None, function))
    return found


def table() -> tuple[dict[str, str], list[Setting]]:
    """(what is left out and why, what is tried)."""
    everything = names()
    out = {name: why for name in everything if (why := left_out(name)) is not None}
    return out, [one for name, value in everything.items() if name not in out for one in settings(name, value)]
