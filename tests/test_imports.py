"""Imports go one way, and importing is cheap. Reads the imports of every file of the package."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "tersenet"
FILES = sorted(path for path in ROOT.rglob("*.py"))

# room -> rooms that it may import. A file at the top is a room of its own.
METHOD = {
    "errors", "atomic", "findings", "left_alone", "named", "numerics", "bricks", "graph", "progress", "task", "step",
    "train", "unseen",
}  # fmt: skip
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "atomic": {"errors"},
    "cache": set(),
    "plain_yaml": set(),
    "compiler": {"errors"},
    "augmentation": {"errors"},
    "numerics": {"errors"},
    "bricks": {"errors", "numerics"},
    "graph": {"errors", "numerics", "bricks"},
    "metrics": {"errors", "numerics"},
    "task": {"errors", "metrics", "numerics"},
    "named": {"errors"},
    "findings": set(),
    "progress": set(),
    "unseen": {"numerics", "task"},
    "left_alone": {"named"},
    "scored_on": {"metrics", "task"},
    "step": {"errors", "numerics", "bricks", "graph", "left_alone", "named", "task"},
    "repeat": {"errors", "bricks", "graph", "left_alone", "named", "numerics", "task", "step", "unseen"},
    "resize": {"errors", "numerics", "task", "step"},
    "report": {"errors", "atomic", "left_alone", "numerics"},
    "train": {
        "errors",
        "atomic",
        "augmentation",
        "bricks",
        "compiler",
        "findings",
        "left_alone",
        "numerics",
        "task",
        "step",
        "unseen",
    },
    "pruning": METHOD,
    "quantization": METHOD,
    "distill": METHOD,
    "rewrite": METHOD,
    "size": METHOD | {"codec"},
    "models": {"errors", "atomic", "bricks", "task"},
    "data": {"errors", "atomic", "augmentation", "cache", "task"},
    "codec": {"errors", "atomic", "numerics"},
    "deploy": {"errors", "atomic", "cache", "compiler", "numerics", "bricks", "graph", "task", "report", "codec"},
    "onnx_import": {"errors", "graph", "task", "deploy"},
    "search": {
        "errors",
        "atomic",
        "bricks",
        "cache",
        "left_alone",
        "named",
        "numerics",
        "graph",
        "progress",
        "task",
        "step",
        "deploy",
    },
}
# These import anything, and nothing imports them but each other (and `tersenet` itself, by name).
TOP = {
    "inputs_said",
    "preparations",
    "recipe",
    "run",
    "job",
    "prove",
    "ship",
    "dry_run",
    "targets",
    "tables",
    "files",
    "gate",
    "packing",
    "predict",
    "sources",
    "methods",
    "cli",
    "options",
    "outcome",
    "demo",
    "exports",
    "functions",
    "loaders",
    "__init__",
}


def room(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(source: str) -> set[str]:
    """The rooms that a file imports, inside functions too."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module and node.module.startswith("tersenet."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "tersenet":
            rooms.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            rooms.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("tersenet."))
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_room_may(path: Path) -> None:
    home = room(path)
    if home in TOP:
        return
    assert home in ALLOWED, f"{home} is a room that this test does not know"
    beyond = imported(path.read_text(encoding="utf-8")) - ALLOWED[home] - {home}
    assert not beyond, f"{home} must not import {sorted(beyond)}"


def test_a_planted_import_is_found() -> None:
    assert imported("def f():\n    from tersenet.run import Run\n") == {"run"}
    assert "run" not in ALLOWED["graph"]


def test_there_is_no_drawer() -> None:
    assert not [path for path in FILES if path.stem in {"utils", "util", "helpers", "misc", "common"}]


def _modules_after(statement: str) -> set[str]:
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(json.loads(out.splitlines()[-1]))


def test_importing_tersenet_loads_no_heavy_package() -> None:
    heavy = {"torch", "onnx", "onnxruntime", "openvino", "datasets", "sklearn", "lightning_fabric", "kornia"}
    assert not heavy & _modules_after("import tersenet")


def test_the_command_line_answers_without_torch() -> None:
    assert "torch" not in _modules_after("import tersenet.cli")


def test_promised_names_load_no_optional_package() -> None:
    optional = {"onnx", "onnxruntime", "openvino", "datasets", "sklearn", "kornia", "PIL"}
    loaded = _modules_after("import tersenet; [getattr(tersenet, name) for name in tersenet.__all__]")
    assert "torch" in loaded
    assert not optional & loaded
