"""A program: `tfnas lut build` again and again in forks of one process, each ended by a signal at a place asked for.

Its argument is a JSON list of [phase, number, signal, copy, arguments]: the build saves all it has at every step, sends
itself the signal at the given step of the phase (number 0: never), and when it has ended the partial file is copied.
It prints a JSON list of exit codes, -9 for a SIGKILL.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence

from tfnas.cli import main
from tfnas.latency import profile


def _build(phase: str, number: int, signal_number: int, arguments: Sequence[str]) -> int:
    steps: list[str] = []
    tick = profile._Build._tick

    def counted(build: profile._Build, of: str = "widths") -> None:
        steps.append(of)
        if number and steps.count(phase) == number:
            os.kill(os.getpid(), signal_number)
        tick(build, of)

    profile._SAVE_EVERY_S = 0.0
    profile._Build._tick = counted  # type: ignore[method-assign]
    return main(["lut", "build", *arguments])


def _run(phase: str, number: int, signal_number: int, copy: str, arguments: list[str]) -> int:
    child = os.fork()
    if child == 0:
        code = 120
        try:
            code = _build(phase, number, signal_number, arguments)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.path.exists(f"{arguments[0]}.partial"):
        shutil.copy(f"{arguments[0]}.partial", copy)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    import tfnas.cli.lut_build  # noqa: F401 - once, for all forks

    print(json.dumps([_run(*case) for case in json.loads(sys.argv[1])]))
