"""`tfnas search` (also `tfnas-search`): run or resume a search; see `tfnas.pipeline.search`."""

from __future__ import annotations

import sys

from tfnas.cli.codes import FAILED, OK, TARGET_MISSED
from tfnas.config_io import parse_search_arguments


def run(arguments: list[str]) -> int:
    """Search by the command line's configuration; returns the exit code."""
    config = parse_search_arguments(arguments)

    from tfnas.bilevel import SearchFailed
    from tfnas.interrupt import SearchInterrupted
    from tfnas.pipeline import search

    try:
        result = search(config)
    except SearchInterrupted as stopped:
        print(f"tfnas search: {stopped}", file=sys.stderr)
        return 128 + stopped.signal_number
    except SearchFailed as error:
        print(f"tfnas search: error: {error}", file=sys.stderr)
        return FAILED
    if not result.met:
        print(
            f"tfnas search: the derived network has {result.lut_latency_ms:.4f} ms, the target is "
            f"{result.target_latency_ms:.4f} ms; --derive repair finds the most probable network that meets it",
            file=sys.stderr,
        )
        return TARGET_MISSED
    return OK
