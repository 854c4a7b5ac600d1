"""Files that are written and held to the model that they were made from, in every runtime asked for, or removed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tersenet.deploy.reference import Reference
from tersenet.deploy.verify import Agreement, check, compare_file
from tersenet.errors import ExportError, FileError


def checked(path: Path, runtimes: Sequence[str], reference: Reference) -> dict[str, Agreement]:
    """Holds a written file to its model; one that is wrong in a runtime is removed.

    Args:
        runtimes: that read the file.
    Returns:
        runtime -> how far the file is from the model there.
    Raises:
        ExportError: when it is wrong, with the figures, or does not open; the file is gone then.
    """
    agreements = {}
    try:
        for runtime in runtimes:
            agreements[runtime] = compare_file(path, runtime, reference)
            check(agreements[runtime], f"{path} in {runtime}")
    except ExportError:
        _remove(path)
        raise
    except FileError as error:  # just written, and the runtime refuses it
        _remove(path)
        raise ExportError(str(error)) from error
    return agreements


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    if path.suffix == ".xml":
        path.with_suffix(".bin").unlink(missing_ok=True)
