"""Every command line and every option that README, docs and --help name can be typed as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from command import tersenet
from tersenet.cli import app
from tersenet.outcome import WRONG_USE

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "zoo" / "README.md"]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OF_SCRIPTS = {"--again"}  # options of what is in benchmarks/
FENCED = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def lines() -> list[tuple[str, str]]:
    """(page, command line), of blocks and of running text."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        written = [" ".join(each.split()) for each in re.findall(r"`(tersenet [a-z][^`]*)`", FENCED.sub("", text))]
        for block in FENCED.findall(text):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                if re.match(r"(\$ )?tersenet [a-z]", line):
                    line = re.sub(r"^(?:\$ )?tersenet +([a-z]+) +", r"tersenet \1 ", line)
                    # What a command does stands beside it, and sometimes a second command.
                    parts = re.split(r" {2,}|\s#", line)
                    written += [part for part in parts if part.startswith("tersenet ")]
        found += [(page.name, line) for line in written]
    return found


def parsed(line: str) -> None:
    """Parses a command line as typing it would, and runs nothing. Raises what the parser raises."""
    _, name, *arguments = shlex.split(re.sub(r"[\[\]]", "", line))  # what is optional is typed too
    arguments = ["1" if argument == "N" else argument for argument in arguments]
    if not arguments or "..." in arguments:
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("--")} <= known
    else:
        COMMANDS[name].make_context(name, arguments)


def test_there_are_lines() -> None:
    assert len(lines()) > 40
    assert len({line.split()[1] for _, line in lines()} & COMMANDS.keys()) > 10


@pytest.mark.parametrize(("page", "line"), lines(), ids=lambda value: value[:50])
def test_a_line_can_be_typed(page: str, line: str) -> None:
    for each in line.split(" | ") if line.startswith("tersenet methods") else [line]:
        parsed(each if each.startswith("tersenet ") else f"tersenet {each}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_an_option_that_a_page_names_is_one(page: Path) -> None:
    """In running text, where no command stands beside it."""
    known = {option for command in COMMANDS.values() for parameter in command.params for option in parameter.opts}
    known |= {"--help", "--debug", "--version"}
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    named = {
        option
        for code in re.findall(r"`([^`\n]+)`", text)
        if not re.match(r"(python|pip|make|pytest|git)\b", code)
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
    }
    assert not named - known - OF_SCRIPTS


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_of_the_help_can_be_typed(name: str) -> None:
    command, shown = COMMANDS[name], tersenet(name, "--help").out
    required = [argument for parameter in command.params if parameter.required for argument in _typed(parameter, "1")]
    for parameter in command.params:
        for option in parameter.opts:
            if option.startswith("-"):
                assert re.fullmatch(r"-[a-z]|--[a-z][a-z0-9]*(-[a-z0-9]+)*", option), option
                assert getattr(parameter, "hidden", False) or option in shown
                assert any(_parses(command, [*required, option, *value]) for value in ([], ["30"], ["0.5"])), option


def _typed(parameter: Any, value: str) -> list[str]:
    return [parameter.opts[0], value] if parameter.opts[0].startswith("-") else [value]


def _parses(command: Any, arguments: list[str]) -> bool:
    try:
        command.make_context(command.name, arguments)
    except WRONG_USE:
        return False
    return True
