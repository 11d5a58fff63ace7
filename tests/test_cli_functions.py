"""Functions as commands: named, positional and bare arguments."""

from __future__ import annotations

import pytest
from jsonargparse import ArgumentError
from tfnas.cli.functions import run_function

CALLS: list[tuple[str, str, int, bool]] = []


def command(table: str, config: str = "small", count: int = 3, json: bool = False) -> int:
    """Records its arguments."""
    CALLS.append((table, config, count, json))
    return 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["F", "--config", "C", "--count", "5", "--json"], ("F", "C", 5, True)),
        (["--json", "F", "--config=C"], ("F", "C", 3, True)),
        (["--table", "F", "--json", "false"], None),
        (["--config", "C", "--table", "F"], ("F", "C", 3, False)),
        (["F", "--json=false"], ("F", "small", 3, False)),
    ],
)
def test_arguments_may_be_positional_or_named(
    arguments: list[str], expected: tuple[str, str, int, bool] | None
) -> None:
    CALLS.clear()
    if expected is None:
        with pytest.raises(ArgumentError):  # a bare flag takes no value
            run_function("test", command, arguments)
        return
    assert run_function("test", command, arguments) == 0
    assert [expected] == CALLS


@pytest.mark.parametrize("arguments", [[], ["F", "G"], ["F", "--cout", "3"], ["--table", "F", "G"]])
def test_missing_and_unknown_arguments_are_errors(arguments: list[str]) -> None:
    with pytest.raises(ArgumentError):
        run_function("test", command, arguments)


def test_help_shows_the_short_form(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_function("tfnas test", command, ["--help"])
    assert "short: tfnas test TABLE" in capsys.readouterr().out
