"""`tfnas lut COMMAND`: measure, check, show, compare and convert latency tables."""

from __future__ import annotations

import importlib

from tfnas.cli.codes import BAD_INPUT, OK
from tfnas.cli.functions import run_function

COMMANDS = {
    "build": ("lut_build", "build", "measure a latency table of a search space"),
    "check": ("lut_build", "check", "measure random networks and say whether a table still predicts them"),
    "show": ("lut_tables", "show", "what a table holds, its curves in the terminal or as a picture"),
    "compare": ("lut_tables", "compare", "how much two tables differ, beyond one common scale"),
    "import": ("lut_tables", "import_table", "read another program's table and write it as JSON"),
    "export": ("lut_tables", "export_table", "write a table in another program's format"),
}


def run(arguments: list[str]) -> int:
    """Run `tfnas lut COMMAND ...`; returns its exit code."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in COMMANDS:
        module, function, _ = COMMANDS[command]
        found = getattr(importlib.import_module(f"tfnas.cli.{module}"), function)
        return run_function(f"tfnas lut {command}", found, rest)
    lines = "\n".join(f"  {name:<8} {text}" for name, (_, _, text) in COMMANDS.items())
    print(f"usage: tfnas lut COMMAND [options]     (tfnas lut COMMAND --help shows the options)\n\ncommands:\n{lines}")
    return OK if command in ("-h", "--help") else BAD_INPUT
