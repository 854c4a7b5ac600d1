"""What README and docs show is what there is: its Python runs, its recipes parse, its commands exist."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tersenet.recipe import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = sorted((ROOT / "src" / "tersenet").rglob("*.py"))
WITH_EXAMPLES = [path for path in SOURCES if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_recipe_parses(path: Path) -> None:
    assert Recipe.read(path).steps


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_examples_in_docstrings(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.minutes
def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    done = subprocess.run(
        [sys.executable, "-c", code.group(1)],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "smaller" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"small.onnx", "half.onnx", "runs"}


@pytest.mark.minutes
def test_the_python_page_runs(tmp_path: Path) -> None:
    """Its blocks in order, as one script."""
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    verdicts = [line for line in done.stdout.splitlines() if "smaller" in line]
    assert ["accuracy" in line for line in verdicts] == [True, False, True]
    assert "macro F1" in verdicts[1]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"int8", "f1", "loop"}


def test_the_python_of_the_report_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "report.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code.group(1), names)
    value, low, high = map(float, re.findall(r"0\.\d+", capsys.readouterr().out))
    assert low < value < high
    outputs, target = torch.tensor([[3.0], [1.0]]), torch.tensor([2.5, 2.5])
    assert names["mae"].score([names["mae"].update(outputs, (None, target))])[0] == 1.0


def test_every_command_of_the_readme_exists() -> None:
    from tersenet.cli import app

    known = {command.callback.__name__ for command in app.registered_commands if command.callback}
    shown = set(re.findall(r"^tersenet +([a-z]+)", README, re.MULTILINE))
    assert shown <= known
    assert known - {"demo"} <= shown | {"unpack", "doctor"}


def test_the_files_that_the_readme_links_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_the_figures_of_the_readme_are_those_of_the_reports() -> None:
    done = subprocess.run([sys.executable, "docs/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("<!-- from ", README)) == 3
