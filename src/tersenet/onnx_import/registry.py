"""The table of operators: which function computes which operator of ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tersenet.onnx_import.call import Call

Handler = Callable[["Call"], Any]
HANDLERS: dict[str, Handler] = {}


def operator(*names: str) -> Callable[[Handler], Handler]:
    """Registers a function for operators of ONNX's own domain.

    It gets a Call and returns the only output, or a tuple of the first outputs.
    """

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register
