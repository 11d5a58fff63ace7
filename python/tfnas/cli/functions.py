"""A typed, documented function as a command: one `--option` per parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser


def run_function(prog: str, function: Callable[..., int], arguments: list[str]) -> int:
    """Parse `arguments` for `function`'s parameters, call it, return its exit code.

    A bare `--flag` means true; words without an option's name are the parameters without a default, in order.
    """
    return function(**parse_arguments(prog, function, arguments))


def parse_arguments(prog: str, function: Callable[..., int], arguments: list[str]) -> dict[str, Any]:
    """`arguments` as values of `function`'s parameters; ArgumentError where they are not."""
    parameters = inspect.signature(function).parameters.values()
    flags = {f"--{parameter.name}" for parameter in parameters if isinstance(parameter.default, bool)}
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    short = f"short: {prog} {' '.join(name.upper() for name in required)}" if required else None
    description = _summary(function)
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False, description=description, epilog=short)
    parser.add_function_arguments(function, as_group=False)
    values = parser.parse_args(_name_positional(arguments, flags, required))
    found: dict[str, Any] = parser.instantiate(values).as_dict()
    return found


def _name_positional(arguments: list[str], flags: set[str], required: list[str]) -> list[str]:
    """`arguments` with every value named: `lut check FILE --json` becomes `--lut=FILE --json=true`."""
    given = {argument.removeprefix("--").partition("=")[0] for argument in arguments if argument.startswith("--")}
    waiting = [name for name in required if name not in given]
    named: list[str] = []
    is_value = False
    for argument in arguments:
        if is_value or (not argument.startswith("-") and not waiting):
            named.append(argument)
            is_value = False
        elif not argument.startswith("-"):
            named.append(f"--{waiting.pop(0)}={argument}")
        elif argument in flags:
            named.append(f"{argument}=true")
        else:
            named.append(argument)
            is_value = argument.startswith("--") and "=" not in argument and argument != "--help"
    return named


def _summary(function: Callable[..., int]) -> str:
    return (function.__doc__ or "").strip().partition("\n")[0]
