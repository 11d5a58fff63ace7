"""The commands that the documents show are accepted by their parsers, as they stand there."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path

import pytest
from tfnas.cli import COMMANDS, lut
from tfnas.cli.functions import parse_arguments
from tfnas.cli.train import parse_train_arguments
from tfnas.config_io import parse_search_arguments

ROOT = Path(__file__).parents[1]


def shown_commands() -> list[str]:
    """Every `tfnas ...` of the shell blocks in README.md and docs/*.md."""
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in path.read_text(encoding="utf-8").split("```sh\n")[1:]:
            for line in block.split("```")[0].replace("-m tfnas ", "&& tfnas ").splitlines():
                parts = line.split(" # ")[0].split("&&")
                found += [part.strip() for part in parts if part.strip().startswith("tfnas")]
    return found


def test_there_are_commands_to_check() -> None:
    assert len(shown_commands()) > 20


@pytest.mark.parametrize("line", shown_commands())
def test_a_shown_command_is_accepted(line: str) -> None:
    name, *arguments = shlex.split(line)
    command = "search" if name == "tfnas-search" else arguments.pop(0)
    assert command in COMMANDS
    if command == "search":
        parse_search_arguments([argument for argument in arguments if argument != "--print_config"])
    elif command == "train":
        if "--run" in arguments:  # a run that is not there; what follows it is an option like any other
            del arguments[arguments.index("--run") : arguments.index("--run") + 2]
        parse_train_arguments([argument for argument in arguments if argument != "--resume"])
    elif command == "lut":
        module, function, _ = lut.COMMANDS[arguments[0]]
        found = getattr(importlib.import_module(f"tfnas.cli.{module}"), function)
        parse_arguments(f"tfnas lut {arguments[0]}", found, arguments[1:])
    elif command not in ("report", "info"):
        found = getattr(importlib.import_module(f"tfnas.cli.{command}"), command)
        parse_arguments(f"tfnas {command}", found, arguments)
