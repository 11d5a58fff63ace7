"""Runs `tfnas` commands in forks of a process that has imported everything, and kills them where it is told to.

Started as a program it reads requests, one JSON object a line, and answers each with one; `WarmParent` talks to it.
Nothing is computed before the forks, so that no thread exists that a fork would lose.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

# The calls that change a folder, as Python's audit events name them, with the position of the path.
_CALLS = {"open": 0, "os.rename": 0, "os.remove": 0, "os.mkdir": 0, "os.truncate": 0, "os.chmod": 0}
_COUNTER = struct.Struct("q")


@dataclass(frozen=True)
class Ended:
    """How a command ended: by itself with `code`, or killed (`code` None); calls counted, the last one, all output."""

    code: int | None
    seconds: float
    calls: int
    call: str
    output: str


@dataclass(frozen=True)
class _Request:
    arguments: list[str]
    log: str
    folder: str
    kill_after_s: float | None
    kill_at_call: int | None
    calls: str


class WarmParent:
    """The process to fork from. A context manager; `run` may be called any number of times."""

    def __init__(self, scratch: Path) -> None:
        self._log = scratch / "output.txt"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        kill_after_s: float | None = None,
        kill_at_call: int | None = None,
        calls: str = "",
    ) -> Ended:
        """Run `tfnas ARGUMENTS`, sending SIGKILL after a time or before a call that changes something in `folder`.

        Calls are counted from 1, those whose description (`os.rename checkpoint.pt.tmp`) begins with `calls`.
        """
        request = _Request(list(arguments), str(self._log), str(folder), kill_after_s, kill_at_call, calls)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(request)) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> WarmParent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def _serve(requests: IO[str], answers: IO[str]) -> None:
    for line in requests:
        answers.write(json.dumps(asdict(_answer(_Request(**json.loads(line))))) + "\n")
        answers.flush()


def _answer(request: _Request) -> Ended:
    counted = mmap.mmap(-1, 4096)
    start_s = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(request, counted)
    handle = os.pidfd_open(child)
    try:
        if not select.select([handle], [], [], request.kill_after_s)[0]:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    finally:
        os.close(handle)
    code = os.waitstatus_to_exitcode(status)
    if code < 0 and code != -signal.SIGKILL:
        raise RuntimeError(f"the command ended by {signal.Signals(-code).name}: {Path(request.log).read_text()}")
    (calls,) = _COUNTER.unpack_from(counted)
    call = counted[_COUNTER.size :].rstrip(b"\0").decode(errors="replace")
    output = Path(request.log).read_text(errors="replace")
    return Ended(code if code >= 0 else None, time.monotonic() - start_s, calls, call, output)


def _become(request: _Request, counted: mmap.mmap) -> None:
    """Be the command, to the end of the process."""
    code = 120
    try:
        log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - standard output of the command
        _watch(request, counted)
        from tfnas.cli import main

        code = main(request.arguments)
        sys.stdout.flush()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _writes(arguments: tuple[object, ...]) -> bool:
    """Whether the `open` of a path is for writing."""
    path, _, flags = arguments
    return isinstance(path, str) and isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def _watch(request: _Request, counted: mmap.mmap) -> None:
    """Count the calls that change something in the folder; die before the one that was asked for."""

    def on_call(event: str, arguments: tuple[object, ...]) -> None:
        if event not in _CALLS or (event == "open" and not _writes(arguments)):
            return
        path = arguments[_CALLS[event]]
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        if not isinstance(path, str) or not path.startswith(request.folder):
            return
        call = f"{event} {os.path.relpath(path, request.folder)}"
        if not call.startswith(request.calls):
            return
        (calls,) = _COUNTER.unpack_from(counted)
        _COUNTER.pack_into(counted, 0, calls + 1)
        counted[_COUNTER.size : _COUNTER.size + 256] = call.encode()[:256].ljust(256, b"\0")
        if calls + 1 == request.kill_at_call:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_call)


if __name__ == "__main__":
    for module in ("tfnas.pipeline", "tfnas.train", "tfnas.several_targets", "tfnas.cli.search", "tfnas.cli.train"):
        importlib.import_module(module)
    if importlib.util.find_spec("matplotlib"):
        importlib.import_module("matplotlib.backends.backend_agg")
        importlib.import_module("matplotlib.figure")
    importlib.import_module("torch._dynamo")  # what every optimizer imports when it is made
    _serve(sys.stdin, sys.stdout)
    os._exit(0)  # nothing to tidy up, and torch takes its time
