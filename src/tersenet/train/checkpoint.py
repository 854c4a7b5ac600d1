"""What a training keeps so that it can go on after a cut: one file per training, plain data, whole or not there.

A file is named by the fingerprint of its training (settings, starting weights, data length, seed), so a chain that
trains twice keeps two. `train-<id>.ckpt` is under way, `train-<id>.done.ckpt` holds final numbers only. Read with
`weights_only=True`: no code in it is ever run.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersenet.atomic import writing
from tersenet.errors import RunError
from tersenet.step import Companion, Step
from tersenet.task import Task

# These change how a training is watched or stored, not what it computes.
_FREE = ("save_every_s", "logger", "max_hours")


class Checkpoint:
    """The file of one training.

    Args:
        folder: made when it is not there.
        fingerprint: what must be the same for the training to go on, by name.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, str]) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        name = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / f"train-{name}.ckpt"
        self.done = folder / f"train-{name}.done.ckpt"

    def read(self) -> dict[str, Any] | None:
        """The state to go on from, None to start anew; "position" is missing from that of a finished training.

        Raises:
            RunError: when the folder holds the unfinished training of something else, or a damaged file.
        """
        if self.done.exists():
            return _load(self.done)
        if self.path.exists():
            return _load(self.path)
        for other in sorted(self.folder.glob("train-*.ckpt")):
            if not other.name.endswith(".done.ckpt"):
                was = _load(other)["fingerprint"]
                changed = [key for key, value in self.fingerprint.items() if was.get(key) != value]
                raise RunError(
                    f"{other} is an unfinished training with {_said(changed[0], was, self.fingerprint)}; "
                    "put that back to go on with it, or delete the file to start anew"
                )
        return None

    def write(self, state: dict[str, Any], finished: bool = False) -> None:
        """Puts a state on disk in one move. Raises TersenetError on a full disk; the file before it stays."""
        # Into memory first: torch.save on a full disk does not raise an OSError.
        buffer = io.BytesIO()
        torch.save({"fingerprint": self.fingerprint, **state}, buffer)
        with writing(self.done if finished else self.path) as temporary:
            temporary.write_bytes(buffer.getbuffer())
        if finished:
            self.remove()

    def remove(self) -> None:
        """Forgets an unfinished training, and what a kill during a write may have left."""
        self.path.unlink(missing_ok=True)
        for leftover in self.folder.glob(f".{self.path.stem}*.part.ckpt"):
            leftover.unlink(missing_ok=True)


def fingerprint(step: Step, model: nn.Module, task: Task, batches: int) -> dict[str, str]:
    """Everything that the result of a training depends on, by name, as text.

    The data is known by its number of batches only; a run folder holds its identity.
    """
    settings = {key: value for key, value in step.settings().items() if key not in _FREE}
    return {
        **{key: _text(value) for key, value in settings.items()},
        "seed": str(task.seed),
        "batches per epoch": str(batches),
        "starting weights": _digest(model),
        "original model": "none" if task.original is None else _digest(task.original),
    }


def numbers_of(model: nn.Module) -> dict[str, Any]:
    """The state dict, and beside it the buffers that a state dict leaves out."""
    state = model.state_dict()
    return {"model": state, "buffers": {key: value for key, value in model.named_buffers() if key not in state}}


def put_numbers(model: nn.Module, state: dict[str, Any]) -> None:
    """The inverse of `numbers_of`."""
    model.load_state_dict(state["model"])
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for key, value in state["buffers"].items():
            buffers[key].copy_(value)


def _load(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise RunError(f"{path} is damaged and cannot be read; delete it to begin this training again") from error


def _text(value: Any) -> str:
    """A setting as text that is the same in every process."""
    if isinstance(value, nn.Module):
        return _digest(value)
    if isinstance(value, Companion):
        return f"{value.name} {{{', '.join(f'{key}: {_text(item)}' for key, item in value.settings().items())}}}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_text, value))}]"
    return repr(value)


def _digest(model: nn.Module) -> str:
    """SHA-256 over the names, shapes, types and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for key, value in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _said(name: str, was: dict[str, str], now: dict[str, str]) -> str:
    if name in ("starting weights", "original model"):
        return f"a different value of {name!r}"
    return f"{name} {was.get(name, 'not set')} where it is now {now[name]}"
