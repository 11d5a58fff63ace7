"""`tfnas search` (also `tfnas-search`): run or resume a search; see `tfnas.pipeline.search`."""

from __future__ import annotations

import sys

from tfnas.cli.codes import OK, TARGET_MISSED
from tfnas.config import SearchConfig
from tfnas.config_io import parse_search_arguments


def run(arguments: list[str]) -> int:
    """Search by the command line's configuration; returns the exit code."""
    config = parse_search_arguments(arguments)

    from tfnas.pipeline import search
    from tfnas.processes import is_first_process

    if isinstance(config.target_latency_ms, list):
        return _search_targets(config)
    result = search(config)
    if result.met:
        return OK
    if is_first_process():
        print(
            f"tfnas search: the derived network has {result.lut_latency_ms:.4f} ms, the target is "
            f"{result.target_latency_ms:.4f} ms; --derive repair finds the most probable network that meets it",
            file=sys.stderr,
        )
    return TARGET_MISSED


def _search_targets(config: SearchConfig) -> int:
    from tfnas.cli.terminal import terminal
    from tfnas.comparison import comparison_table
    from tfnas.processes import is_first_process
    from tfnas.several_targets import search_targets

    result = search_targets(config)
    if is_first_process():
        console = terminal()
        console.print(comparison_table(result.rows))
        console.print(f"written to {result.folder}", highlight=False)
    return OK if all(row.met for row in result.rows) else TARGET_MISSED
