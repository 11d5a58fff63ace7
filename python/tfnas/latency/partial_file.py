"""The file beside a table that keeps a build's samples until the table is written, for one build at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tfnas.locks import hold


def partial_path(output: str | os.PathLike[str]) -> Path:
    """Where a build keeps its samples while it runs: beside the table it will write."""
    return Path(f"{os.fspath(output)}.partial")


@contextlib.contextmanager
def own_partial(output: Path) -> Iterator[Path | None]:
    """`partial_path(output)`, kept from other builds in the meantime; None where `output` is a device or a pipe.

    Raises `ValueError`, before anything is measured, where the table could not be written or another build is at work.
    """
    if output.is_dir():
        raise ValueError(f"output {output} is a folder; name a file")
    if output.exists() and not output.is_file():
        yield None
        return
    partial = partial_path(output)
    lock_path = Path(f"{partial}.lock")
    try:
        lock = hold(lock_path)
    except OSError as error:
        raise ValueError(f"output {output} cannot be written ({error.strerror}); name another file") from None
    if lock is None:
        raise ValueError(f"output {output}: another build is at work there; wait for it or name another file")
    with lock:
        try:
            yield partial
        finally:
            lock_path.unlink(missing_ok=True)
