"""A model compiled while it trains (`torch.compile`, Inductor), and itself again afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from tersenet.compiler import need_compiler


@contextlib.contextmanager
def while_compiled(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, calls of the model run compiled where `wanted`; its parameters and their names stay what they are.

    Chains of operations on single values become one pass over memory, in both directions. Convolutions stay those of
    the library, so a network that is mostly convolutions gains little.

    Raises:
        SettingsError: where there is no C++ compiler.
    """
    if not wanted:
        yield
        return
    need_compiler("compile: true cannot train")
    model.compile(dynamic=False)
    try:
        yield
    finally:
        model._compiled_call_impl = None  # what `compile` sets, and what a call looks at
