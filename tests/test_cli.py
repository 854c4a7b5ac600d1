"""The command line as a user meets it: what is typed, what comes out, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tersenet as package
from command import COMMANDS, DigitsRun, tersenet

TINY = """
from torch import nn
from tersenet.task import Preparation

def net():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    model.preparation = Preparation(size=(8, 8), mean=(0.5,), std=(0.5,))
    print("a print in the user's own code")
    return model
"""


@pytest.fixture
def tiny_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with a user's own model in tiny_net.py and a recipe that only quantizes."""
    (tmp_path / "tiny_net.py").write_text(TINY)
    (tmp_path / "int8.yaml").write_text("steps: [quantize: {}]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_net", raising=False)
    return tmp_path


def typed(*arguments: str, columns: int = 80, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A real process."""
    code = [sys.executable, "-c", "from tersenet.cli import main; main()", *arguments]
    environment = {**os.environ, "COLUMNS": str(columns)}
    return subprocess.run(code, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300)


# Help and wrong use


def test_help_names_every_command_whole() -> None:
    ended = typed("--help")
    assert ended.returncode == 0
    for command in COMMANDS:
        line = next(line for line in ended.stdout.splitlines() if line.startswith(f"  {command} "))
        assert line.endswith(".")
        assert "..." not in line
        assert len(line) <= 80
    assert ended.stderr == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    ended = tersenet(command, "--help")
    assert ended.code == 0
    assert "--json" in ended.out
    options = re.findall(r"^ +(?:-\w, )?--([\w-]+)", ended.out, re.MULTILINE)
    assert [option for option in options if "_" in option or option.endswith("-")] == []  # such as bytes_
    assert max(map(len, ended.out.splitlines())) <= 80


def test_nothing_typed_shows_the_help() -> None:
    ended = tersenet()
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("Usage: tersenet")


def test_the_version() -> None:
    ended = tersenet("--version")
    assert (ended.code, ended.out) == (0, f"tersenet {package.__version__}\n")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("compres", ("no such command 'compres'", "'compress'")),
        ("compress", ("missing argument 'MODEL'", "tersenet compress --help")),
        ("compress resnet20", ("missing option '--data'",)),
        ("compress resnet20 --data digits --frames 1", ("no such option", "--frames")),
        ("compress resnet20 --data digits --memory 0.5", ("memory must be a share such as 0.5x", "got '0.5'")),
        ("compress resnet20 --data digits --macs 0.5x --threads 0", ("--threads", "1")),
        ("compress resnet20 --data digits --macs 0.5x --epochs many", ("--epochs", "integer")),
        ("unpack a.terse", ("missing option '--output'",)),
        ("measure", ("missing argument 'FILE...'",)),
    ],
)
def test_wrong_use_is_one_sentence(line: str, words: tuple[str, ...]) -> None:
    ended = tersenet(*line.split())
    assert all(word in ended.sentence for word in words), ended.sentence
    assert len(ended.err.splitlines()) == 1


def test_an_error_that_was_not_foreseen_is_no_missed_target(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise ZeroDivisionError("division by zero\nand a second line")

    monkeypatch.setattr("tersenet.methods.known_methods", broken)
    ended = tersenet("methods")
    assert ended.sentence.startswith("ZeroDivisionError: division by zero; ")
    assert "--debug" in ended.sentence
    with pytest.raises(ZeroDivisionError):
        tersenet("--debug", "methods")


def test_a_folder_that_cannot_be_written_is_said_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = tersenet("pack", "digits", "-o", tmp_path / "file" / "x.terse")
    assert "cannot be" in ended.sentence
    assert str(tmp_path / "file") in ended.sentence


def test_an_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("tersenet.methods.known_methods", interrupted)
    ended = tersenet("methods")
    assert ended.code == 130
    assert "--out" in ended.err


# Commands on no model


def test_methods() -> None:
    found = tersenet("methods", "--json").json["methods"]
    names = {entry["name"] for entry in found}
    assert {"fold_batch_norm", "prune_channels", "quantize", "train", "settle", "soft_targets"} <= names
    quantize = next(entry for entry in found if entry["name"] == "quantize")
    assert quantize["needs"] == "inputs"
    assert quantize["settings"]["weights"] == "int8"
    ended = tersenet("methods")
    assert all(name in ended.out for name in names)


def test_doctor() -> None:
    found = tersenet("doctor", "--json").json
    assert "torch" in json.dumps(found)
    assert tersenet("doctor").code == 0


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("command", ["methods", "doctor"])
def test_what_is_printed_fits(command: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert max(map(len, tersenet(command).out.splitlines())) <= columns


# The main job


@pytest.mark.minutes
def test_compress_prints_the_report_and_nothing_else(digits_run: DigitsRun) -> None:
    found = digits_run.ended.json
    assert found.pop("run") == str(digits_run.folder)
    assert found == json.loads((digits_run.folder / "report.json").read_text())
    assert [row["step"] for row in found["rows"]] == [
        "original", "1. prune_channels", "2. train", "3. fold_batch_norm", "4. quantize",
    ]  # fmt: skip
    assert found["settings"]["model"] == "digits"
    assert found["settings"]["data"] == "digits"
    # Progress is there, and on the other channel.
    assert "1/4 prune_channels" in digits_run.ended.err
    assert "epoch 1/1" in digits_run.ended.err
    assert "random numbers" not in digits_run.ended.err


@pytest.mark.minutes
def test_compress_again_is_finished_already(digits_run: DigitsRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    before = (digits_run.folder / "report.json").read_bytes()
    arguments = (
        "compress", "digits", "--weights", digits_run.weights, "--data", "digits", "--recipe", digits_run.recipe,
        "--out", digits_run.folder, "--resume",
    )  # fmt: skip
    ended = tersenet(*arguments)
    assert ended.code == 0
    assert "finished already" in " ".join(ended.err.split())
    assert (digits_run.folder / "report.json").read_bytes() == before
    # What people see: rows, files, the verdict, where to look.
    assert "4. quantize" in ended.out
    assert "model.terse: " in ended.out
    assert "smaller" in ended.out
    assert ended.out.rstrip().endswith("report.html")
    *lines, last = ended.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert last == f"open {digits_run.folder / 'report.html'}"  # however long it is
    assert tersenet(*arguments, "-q").err == ""


@pytest.mark.minutes
def test_compress_into_the_folder_of_another_recipe(digits_run: DigitsRun, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("steps: [fold_batch_norm]")
    before = sorted(digits_run.folder.rglob("*"))
    ended = tersenet(
        "compress", "digits", "--weights", digits_run.weights, "--data", "digits", "--out", digits_run.folder,
        "--recipe", tmp_path / "other.yaml",
    )  # fmt: skip
    assert "another recipe" in ended.sentence
    assert "--out" in ended.sentence
    assert sorted(digits_run.folder.rglob("*")) == before


@pytest.mark.minutes
def test_a_missed_target_is_written_and_reported(tiny_here: Path, caplog: pytest.LogCaptureFixture) -> None:
    ended = tersenet(
        "compress", "tiny_net:net", "--data", "digits", "--recipe", "int8.yaml", "--out", "run", "--max-drop", "-50",
        "--json", "-q",
    )  # fmt: skip
    assert ended.code == 1, ended.err
    assert ended.json["targets"][0]["met"] is False
    assert "MISSED" in ended.json["verdict"]
    for name in ("report.json", "report.html", "recipe.yaml", "model.terse", "model.onnx", "model.pt2", "README.md"):
        assert (tiny_here / "run" / name).stat().st_size > 0
    # A model's own print does not get into standard output, and running foreign code is said.
    assert "a print in the user's own code" in ended.err
    assert "running your own code: tiny_net:net" in caplog.text


@pytest.mark.minutes
def test_a_model_without_weights_is_the_same_each_time(tmp_path: Path) -> None:
    (tmp_path / "fold.yaml").write_text("steps: [fold_batch_norm]")
    arguments = ("compress", "digits", "--data", "random:1x8x8", "--recipe", tmp_path / "fold.yaml")
    first = tersenet(*arguments, "--out", tmp_path / "run")
    assert first.code == 0
    assert "random numbers" in first.err
    again = tersenet(*arguments, "--out", tmp_path / "run")
    assert again.code == 0
    assert "finished already" in " ".join(again.err.split())
    assert "another starting model" in tersenet(*arguments, "--out", tmp_path / "run", "--seed", "1").sentence


@pytest.mark.minutes
def test_plan_takes_what_compress_takes(digits_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = tersenet(
        "plan", "digits", "--weights", digits_weights, "--data", "digits", "--macs", "0.5x", "--epochs", "3",
        "--max-drop", "1", "--out", "run", "--json", "-q",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    rows = ended.json["rows"]
    assert [row["step"] for row in rows] == ["original", "1. prune_channels", "2. fold_batch_norm", "3. quantize"]
    assert rows[-1]["macs"] <= 0.5 * rows[0]["macs"]
    assert ended.json["left_out"] == ["train"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.minutes
def test_profile(digits_weights: Path) -> None:
    ended = tersenet("profile", "digits", "--weights", digits_weights, "--json")
    assert ended.code == 0, ended.err
    assert "conv2" in ended.out
    assert "conv2" in tersenet("profile", "digits", "--weights", digits_weights).out


# What can be done with a run


@pytest.mark.minutes
def test_measure(digits_run: DigitsRun, monkeypatch: pytest.MonkeyPatch) -> None:
    original, final = digits_run.folder / "files" / "00-original.onnx", digits_run.folder / "model.onnx"
    ended = tersenet("measure", original, final, "--data", "digits", "--json")
    assert ended.code == 0, ended.err
    found = ended.json
    assert list(found["files"]) == [str(original), str(final)]
    rows = digits_run.ended.json["rows"]
    for path, row in ((original, rows[0]), (final, rows[-1])):
        entry = found["files"][str(path)]
        assert entry["score"] == row["score"]
        assert entry["samples"] == 359
        latency = entry["latency_ms"]["onnxruntime"]
        assert 0 < latency["low"] <= latency["median"] <= latency["high"]
        assert entry["peak_bytes"] > 0
        assert entry["load_ms"] > 0
    ratio = found["ratios"][0]
    assert {ratio["a"], ratio["b"]} == {str(original), str(final)}
    assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(digits_run.folder)
    shown = tersenet("measure", "model.onnx", "model.terse", "-q")
    assert shown.err == ""
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "ONNX Runtime" in shown.out
    assert "PyTorch" in shown.out


@pytest.mark.minutes
def test_export_pack_unpack_predict(digits_run: DigitsRun, digit_images: list[Path], tmp_path: Path) -> None:
    exported = tersenet("export", digits_run.folder, "--to", "onnx,torch", "--out", tmp_path / "out", "--json").json
    assert list(exported) == [str(tmp_path / "out" / "model.onnx"), str(tmp_path / "out" / "model.pt2")]
    assert all(value["max_abs_error"] < 1e-4 for value in exported.values())
    packed = tersenet("pack", digits_run.folder, "-o", tmp_path / "p.terse", "--json").json
    assert packed["bytes"] == (tmp_path / "p.terse").stat().st_size
    unpacked = tersenet("unpack", tmp_path / "p.terse", "-o", tmp_path / "p.pt2", "--json").json
    assert unpacked == {"file": str(tmp_path / "p.pt2"), "bytes": (tmp_path / "p.pt2").stat().st_size}
    answers = []
    for file in (digits_run.folder / "model.onnx", tmp_path / "p.terse", tmp_path / "p.pt2"):
        found = tersenet("predict", file, *digit_images, "--json", "--top", "2").json
        assert list(found) == [str(path) for path in digit_images]
        assert all(len(guesses) == 2 for guesses in found.values())
        answers.append([guesses[0]["label"] for guesses in found.values()])
    assert answers[0] == answers[1] == answers[2]
    assert sum(answer == str(index) for index, answer in enumerate(answers[0])) >= 8
    shown = tersenet("predict", digits_run.folder / "model.onnx", digit_images[0])
    assert shown.out.startswith(f"{digit_images[0]}: ")
    assert " %" in shown.out


@pytest.mark.minutes
def test_check_and_report(digits_run: DigitsRun, tmp_path: Path) -> None:
    met = tersenet("check", digits_run.folder, "--max-bytes", "0.5x", "--json")
    assert (met.code, met.json["met"]) == (0, True)
    missed = tersenet("check", digits_run.folder, "--max-bytes", "0.5x", "--max-latency", "0.001x")
    assert missed.code == 1
    assert [line.split()[0] for line in missed.out.splitlines()] == ["MISSED", "met"]
    page = tersenet("report", digits_run.folder, "-o", tmp_path / "new" / "page.html", "--json")
    assert page.json["runs"] == [str(digits_run.folder)]
    text = (tmp_path / "new" / "page.html").read_text()
    assert text.startswith(("<!doctype html>", "<!DOCTYPE html>"))
    assert "prune_channels" in text


@pytest.mark.minutes
def test_as_real_processes(digits_run: DigitsRun, digit_images: list[Path]) -> None:
    found = typed("predict", str(digits_run.folder / "model.onnx"), str(digit_images[0]), "--json")
    assert found.returncode == 0
    assert list(json.loads(found.stdout)) == [str(digit_images[0])]
    assert found.stderr == ""
    missed = typed("check", str(digits_run.folder), "--max-bytes", "1")
    assert (missed.returncode, missed.stderr) == (1, "")
    refused = typed("check", "no-such-run", "--max-drop", "1")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "tersenet: there is no folder no-such-run\n"
