"""Silence for libraries that talk: their warnings, their logs, and what their native code prints."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_native() -> Iterator[None]:
    """No warnings, no logs, and nothing printed inside the block, by Python or by native code."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    sys.stdout.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    try:
        with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
            for number in kept:
                os.dup2(nowhere.fileno(), number)
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
    finally:
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)  # what C still holds back would come out after the block
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
        logging.disable(before)
