"""Files that one process holds at a time; a process that ends in any way, also killed, lets go."""

from __future__ import annotations

import fcntl
import os
import warnings
import weakref
from pathlib import Path
from typing import IO


def hold(path: Path) -> IO[str] | None:
    """Make the file `path` and hold it until the result is closed; None where another process holds it.

    The holder may remove the file before it lets go. A file system without locks gets a warning. Raises `OSError`
    where the file cannot be made.
    """
    while True:
        lock = open(path, "w")  # noqa: SIM115 - held until close()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        except OSError as error:
            warnings.warn(f"{path}: this file system has no locks ({error}); keep other processes out", stacklevel=3)
        if _is_there(path, lock):
            _held.add(lock)
            return lock
        lock.close()  # removed by its holder just before it let go


def _is_there(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _let_go() -> None:
    """In a forked process: leave locks to the parent. Data workers outlive a killed run by seconds."""
    for lock in list(_held):
        lock.close()


_held: weakref.WeakSet[IO[str]] = weakref.WeakSet()
os.register_at_fork(after_in_child=_let_go)
