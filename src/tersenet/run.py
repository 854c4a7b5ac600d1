"""The run folder: what was done, step by step, so that it can be shown, replayed and continued.

Per step it holds `NN-name.json` (settings, plan, report row; written last, by rename) and `NN-name.safetensors` (all
numbers). Called again, a run goes on after the last step whose JSON is there. A changed recipe, another starting
model, other data or a damaged file is refused, saying which.
"""

from __future__ import annotations

import copy
import hashlib
import html
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from tersenet.atomic import writing
from tersenet.errors import RunError
from tersenet.step import Plan, Step
from tersenet.task import Task

SCHEMA = 1


@dataclass(frozen=True)
class Entry:
    """One finished step of a run."""

    index: int
    name: str
    plan: Plan
    row: dict[str, Any]
    numbers: Path


class Journal:
    """The resumable part of a run folder.

    Args:
        folder: made when it is not there.
        steps: what the run does.
        identity: what must be the same for a run to be continued, by name, such as {"recipe": ..., "seed": ...}.
    Raises:
        RunError: when the folder holds another run, or is damaged.
    """

    def __init__(self, folder: Path, steps: tuple[Step, ...], identity: dict[str, Any]) -> None:
        self.folder, self.steps, self.identity = folder, steps, identity
        self.entries: list[Entry] = []
        manifest = folder / "run.json"
        begun = manifest.exists() and any(
            path.suffix == ".state" or path.name[:2].isdigit() for path in folder.iterdir()
        )
        if begun:
            self._check(manifest)
            self._read()
        else:
            # A run that failed before its first step was done holds nothing that could be lost.
            ours = {manifest, folder / "files"} if manifest.exists() else {manifest}  # files of the original
            if folder.exists() and any(path not in ours for path in folder.iterdir()):
                raise RunError(
                    f"{folder} is not empty and holds no run of ours; choose another folder with --out, or empty it"
                )
            with writing(manifest) as temporary:
                temporary.write_text(json.dumps({"schema": SCHEMA, **identity}, indent=1), encoding="utf-8")

    def _check(self, manifest: Path) -> None:
        was = _read_json(manifest)
        for key, value in {"schema": SCHEMA, **self.identity}.items():
            if was.get(key) != value:
                shown = "" if len(str(value)) > 60 else f" (it was {was.get(key)!r}, now {value!r})"
                raise RunError(
                    f"{self.folder} holds a run with another {key}{shown}; choose another folder with --out, "
                    "or delete this one to start anew"
                )

    def _read(self) -> None:
        for index, step in enumerate(self.steps, start=1):
            path = self._path(index, step.name, ".json")
            if not path.exists():
                break
            data = _read_json(path)
            numbers = self.folder / str(data.get("numbers", {}).get("file", ""))
            if data.get("step") != step.name or not numbers.is_file():
                raise RunError(f"{path} is damaged (its numbers are missing); delete it to repeat that step")
            if _sha256(numbers) != data["numbers"]["sha256"]:
                raise RunError(f"{numbers} is damaged (its checksum differs); delete {path.name} to repeat that step")
            self.entries.append(Entry(index, step.name, data["plan"], data["row"], numbers))

    def _path(self, index: int, name: str, suffix: str) -> Path:
        return self.folder / f"{index:02d}-{name}{suffix}"

    def training_folder(self, index: int, name: str) -> Path:
        """Where a step that trains keeps its own state while it is not finished."""
        return self._path(index, name, ".state")

    def record(self, index: int, step: Step, plan: Plan, row: dict[str, Any], model: nn.Module) -> Entry:
        """Writes a finished step: numbers first, then the JSON that makes it count."""
        numbers = self._path(index, step.name, ".safetensors")
        values = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
        with writing(numbers) as temporary:
            # Written by us, not by the library: a full disk is then an OSError that `writing` can put into words.
            temporary.write_bytes(save(values))
        settings = json.loads(json.dumps(step.settings(), default=repr))
        data = {
            "schema": SCHEMA,
            "step": step.name,
            "settings": settings,
            "plan": plan,
            "row": row,
            "numbers": {"file": numbers.name, "sha256": _sha256(numbers)},
        }
        with writing(self._path(index, step.name, ".json")) as temporary:
            temporary.write_text(json.dumps(data), encoding="utf-8")
        self._keep_logs(index, step.name)
        shutil.rmtree(self.training_folder(index, step.name), ignore_errors=True)
        entry = Entry(index, step.name, plan, row, numbers)
        self.entries.append(entry)
        return entry

    def _keep_logs(self, index: int, name: str) -> None:
        """The training's log outlives its state: NN-name.state/logs becomes logs/NN-name."""
        logs = self.training_folder(index, name) / "logs"
        kept = self.folder / "logs" / f"{index:02d}-{name}"
        if logs.is_dir() and not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            logs.rename(kept)

    def task_after(self, task: Task, count: int) -> Task:
        """The task of what follows `count` steps."""
        for step, entry in zip(self.steps, self.entries[:count], strict=False):
            task = step.task_after(task, entry.plan)
        return task

    def left_as_it_was(self, original: nn.Module, count: int) -> bool:
        """Whether the last of `count` steps, 1 or more, changed neither structure nor numbers of the model."""
        entry = self.entries[count - 1]
        if entry.plan:
            return False
        if count > 1:
            return _sha256(entry.numbers) == _sha256(self.entries[count - 2].numbers)
        return identity_of(self.replay(original, 1)) == identity_of(original)

    def replay(self, original: nn.Module, count: int) -> nn.Module:
        """The model after `count` steps: their plans applied to a copy of the original, then the numbers loaded."""
        model = copy.deepcopy(original)
        for step, entry in zip(self.steps, self.entries[:count], strict=False):
            model = step.apply(model, entry.plan)
        if count:
            try:
                model.load_state_dict(load_file(self.entries[count - 1].numbers))
            except RuntimeError as error:
                raise RunError(f"{self.entries[count - 1].numbers} does not fit the replayed plans: {error}") from error
        return model.eval()


class Run:
    """A finished run: its folder, report, files and verdict. Shows itself in a notebook."""

    def __init__(self, folder: str | Path) -> None:
        """Opens a run folder. Raises RunError when it holds no finished run."""
        self.folder = Path(folder)
        path = self.folder / "report.json"
        if not path.exists():
            what = (
                "an unfinished run; call compress again to go on" if (self.folder / "run.json").exists() else "no run"
            )
            raise RunError(
                f"{self.folder} holds {what}" if self.folder.exists() else f"there is no folder {self.folder}"
            )
        self.report: dict[str, Any] = _read_json(path)

    @property
    def verdict(self) -> str:
        return self.report["verdict"]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.report["rows"]

    @property
    def met(self) -> bool:
        """Whether every target of the run was met."""
        return all(target["met"] for target in self.report.get("targets", []))

    def file(self, name: str) -> Path:
        """The path of one of its files, such as "model.onnx". Raises RunError listing those that there are."""
        path = self.folder / name
        if not path.is_file():
            why = self.report.get("not_written", {}).get(name)
            raise RunError(
                f"{self.folder} has no {name} (it has {', '.join(sorted(self.report['files']))})"
                + (f": {why}" if why else "")
            )
        return path

    @property
    def model(self) -> nn.Module:
        """The compressed model, as a plain module: that of the .terse file, else of the .pt2 file."""
        from tersenet.deploy.artifact import load_terse
        from tersenet.deploy.pt2 import read_pt2

        if "model.terse" in self.report.get("not_written", {}) and "model.pt2" in self.report["files"]:
            return read_pt2(self.file("model.pt2"))[0]
        return load_terse(self.file("model.terse"))

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}): {self.verdict}"

    def _repr_html_(self) -> str:
        cells = ("step", "score", "params", "macs")
        head = "".join(f"<th>{name}</th>" for name in (*cells, "latency ms"))
        body = ""
        for row in self.rows:
            latency = "; ".join(f"{name} {value['median']:.3f}" for name, value in row.get("latency_ms", {}).items())
            values = [
                row["step"],
                f"{row['score']:.4f}" if row.get("score") is not None else "-",
                row.get("params", "-"),
                row.get("macs", "-"),
            ]
            body += "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in (*values, latency)) + "</tr>"
        verdict, folder = html.escape(self.verdict), html.escape(str(self.folder))
        return f"<p>{verdict}</p><table><tr>{head}</tr>{body}</table><p>{folder}</p>"


def identity_of(model: nn.Module) -> str:
    """A checksum over the names, shapes and values of everything in the state dict."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    """hashlib.file_digest for Python 3.10."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged and cannot be read ({error}); delete it to repeat that step") from error
    if not isinstance(data, dict):
        raise RunError(f"{path} is damaged (it holds no JSON object); delete it to repeat that step")
    return data
