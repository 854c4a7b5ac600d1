"""Runs a command of tersenet inside this process, as a user would type it."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tersenet.cli import main

COMMANDS = (
    "demo", "profile", "compress", "plan", "measure", "export", "pack", "unpack", "predict", "check", "report",
    "methods", "doctor",
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Args:
        code: its exit code.
        out, err: what it printed.
    """

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, which must be one JSON object in the strict sense, and nothing else."""
        found = json.loads(self.out, parse_constant=_refused)
        assert isinstance(found, dict)
        return found

    @property
    def sentence(self) -> str:
        """The sentence of a command that was refused: the last line of standard error, without its beginning."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert self.out == ""
        assert "Traceback" not in self.err
        last = self.err.splitlines()[-1]
        assert last.startswith("tersenet: "), self.err
        assert self.err.count("tersenet: ") == 1
        return last.removeprefix("tersenet: ")


def tersenet(*arguments: object) -> Ended:
    """`tersenet ARGUMENTS`, in this process and folder."""
    out, err = io.StringIO(), io.StringIO()
    typed = ["tersenet", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", typed),
        warnings.catch_warnings(),  # the command sets the process's warnings
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            return Ended(int(ended.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("main() returned without an exit code")


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


@dataclass(frozen=True)
class DigitsRun:
    """A finished run of `tersenet compress --json` on digits."""

    folder: Path
    weights: Path
    recipe: Path
    ended: Ended
