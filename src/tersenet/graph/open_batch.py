"""Keeps the size of the batch open while a forward is captured, and says where a forward fixes it.

`len(x)` must be a whole number for Python, and so is `int(x.shape[0])`: the capture would keep the example's. Where a
first capture has fixed the batch, a second one runs with a `len` and an `int` that leave sizes what they are.
"""

from __future__ import annotations

import builtins
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

_len, _int = builtins.len, int
_TORCH = str(Path(torch.__file__).parent)


def _open_len(value: Any) -> Any:
    return value.shape[0] if isinstance(value, Tensor) and value.dim() else _len(value)


class _Meta(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _int)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, _int)


class _OpenInt(int, metaclass=_Meta):
    def __new__(cls, *args: Any) -> Any:
        return args[0] if args and isinstance(args[0], torch.SymInt) else _int(*args)


@contextlib.contextmanager
def sizes_kept(model: nn.Module) -> Iterator[None]:
    """Inside, `len` of a tensor and, in the files of the model's own classes, `int` of a size give open sizes."""
    names = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    files = [
        vars(sys.modules[name]) for name in names if name in sys.modules and not name.startswith(("torch.", "builtins"))
    ]
    files = [names for names in files if "int" not in names]
    builtins.len = _open_len
    for names_of in files:
        names_of["int"] = _OpenInt
    try:
        yield
    finally:
        builtins.len = _len
        for names_of in files:
            names_of.pop("int", None)


def is_open(program: ExportedProgram) -> bool:
    """Whether every input of a program takes a batch of any size."""
    shapes = [value.shape for value in _inputs(program)]
    return all(len(shape) > 0 and open_size(shape[0]) for shape in shapes)


def open_size(size: Any) -> bool:
    """Whether a size can be any number; one that a forward turned into an int is fixed."""
    return not isinstance(size, int) and size.node.maybe_as_int() is None


def why_fixed(program: ExportedProgram) -> str:
    """Where the batch was fixed, as the end of a sentence; "" when torch does not know."""
    values = _inputs(program)
    modes = [getattr(value, "fake_mode", None) for value in values]
    shapes: Any = next((mode.shape_env for mode in modes if mode is not None and mode.shape_env is not None), None)
    if shapes is None:
        return ""
    symbols = [str(s) for s in shapes.replacements if str(s) in _first_symbols(shapes)]
    for symbol, place in getattr(shapes, "replacements_slocs", {}).items():
        if not symbols or str(symbol) in symbols:
            frame = place.maybe_user_loc or place.framework_loc
            if hasattr(frame, "filename"):
                if str(frame.filename).startswith(_TORCH):
                    return ""
                return f" at {frame.filename}, line {frame.lineno} ({frame.line})"
            return f" at {str(frame).strip()}" if frame else ""
    return ""


def _first_symbols(shapes: Any) -> set[str]:
    """The symbols that stand for the first size of an input."""
    return {
        str(symbol)
        for symbol, sources in shapes.var_to_sources.items()
        if any(str(getattr(source, "name", "")).endswith("[0]") for source in sources)
    }


def _inputs(program: ExportedProgram) -> list[Tensor]:
    names = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    return [value for value in values if isinstance(value, Tensor)]
