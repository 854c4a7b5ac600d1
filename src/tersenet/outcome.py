"""How a command ends: its result on standard output, or what went wrong in one sentence on standard error."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from typing import Any

import typer

from tersenet.errors import TersenetError

# What typer raises on an unknown command or option; of that family it promises only this member.
WRONG_USE: Any = typer.BadParameter.__base__


def say(sentence: str) -> None:
    print(f"tersenet: {sentence}", file=sys.stderr)


def failed(error: Exception) -> int:
    """Says an error in one sentence; 2."""
    said = " ".join(str(error).split("\n"))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        said = "the disk is full; free some space, then call again"
    elif isinstance(error, OSError) and error.filename is not None:
        said = f"{error.filename} cannot be read or written ({error.strerror}); check the path"
    elif not isinstance(error, TersenetError):
        lines = str(error).strip().splitlines() or ["without a word"]
        said = f"{type(error).__name__}: {lines[0]}; this was not foreseen: tersenet --debug shows where it happened"
    say(said)
    return 2


def wrong_use(error: Any) -> int:
    """Says what was typed wrong, and where to read on; the help itself where nothing was typed. 2."""
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.ctx.get_help(), file=sys.stderr)
        return 2
    said = error.format_message().strip().rstrip(".?").replace(". Did", "; did")
    command = error.ctx.command_path if error.ctx is not None else "tersenet"
    say(f"{said[:1].lower()}{said[1:]}; {command} --help says more")
    return 2


def show(value: Any, as_json: bool, text: Callable[[], Any]) -> None:
    """Prints a result: as JSON, or what `text` makes for people."""
    if as_json:
        print(json.dumps(value))
    else:
        from rich.console import Console

        shown = text()
        # A path is not broken into two lines; everything else keeps to the width.
        Console(highlight=False).print(shown, soft_wrap=isinstance(shown, str), markup=False)


def file_line(name: str, value: dict[str, Any]) -> str:
    """A file, its size, and how far it is from PyTorch."""
    error = value.get("max_abs_error")
    close = "" if error is None else f", largest error against PyTorch {error:.2g}"
    left = value.get("left_in_float")
    fused = "" if left is None else f", left in float: {', '.join(left) if left else 'nothing'}"
    return f"{name}: {value['bytes']:,} bytes{close}{fused}"


def finish(run: Any, as_json: bool) -> None:
    """Prints a finished run; exit code 1 when a target was missed."""
    from tersenet.report.terminal import notes, table

    if as_json:
        print(json.dumps({"run": str(run.folder), **run.report}))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        console.print(table(run.report))
        for name, value in run.report["files"].items():
            console.print(file_line(name, value), markup=False)
        for note in notes(run.report):
            console.print(note, markup=False)
        for name, why in run.report.get("not_written", {}).items():
            console.print(f"{name}: not written: {why}", markup=False, soft_wrap=True)
        for part in ("zeros", "stages"):
            if found := run.report["settings"].get(part):
                console.print(f"\n{found['said']}", markup=False, soft_wrap=True)
        console.print(f"\n{run.verdict}", markup=False)
        console.print(f"open {run.folder / 'report.html'}", markup=False, soft_wrap=True)
    if not run.met:
        raise typer.Exit(1)
