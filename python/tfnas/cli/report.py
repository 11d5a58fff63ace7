"""`tfnas report RUN`: a self-contained page about a search."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from tfnas.cli.codes import OK


def run(arguments: list[str]) -> int:
    """Write `report.html` into the folder of a finished search; returns the exit code."""
    parser = ArgumentParser(
        prog="tfnas report",
        exit_on_error=False,
        allow_abbrev=False,
        description="Write `report.html` into the folder of a finished search.",
    )
    parser.add_argument("run", type=Path, help="folder of a finished search")
    parser.add_argument("--pictures", action="store_true", help="also draw PNG files (needs matplotlib)")
    args = parser.parse_args(arguments)

    from tfnas.report import write_report

    try:
        print(f"written to {write_report(args.run, args.pictures)}")
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from None
    return OK
