"""A typed, documented function as a command: one `--option` per parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from jsonargparse import ArgumentParser


def run_function(prog: str, function: Callable[..., int], arguments: list[str]) -> int:
    """Parse `arguments` for `function`'s parameters, call it, return its exit code. Bare `--flag` means true."""
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False, description=_summary(function))
    parser.add_function_arguments(function, as_group=False)
    parameters = inspect.signature(function).parameters.values()
    flags = {f"--{parameter.name}" for parameter in parameters if isinstance(parameter.default, bool)}
    values = parser.parse_args([f"{argument}=true" if argument in flags else argument for argument in arguments])
    return function(**parser.instantiate(values).as_dict())


def _summary(function: Callable[..., int]) -> str:
    return (function.__doc__ or "").strip().partition("\n")[0]
