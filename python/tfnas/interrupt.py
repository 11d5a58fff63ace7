"""What ends a run: signals, answered between two steps, what makes it fail, and other processes that do."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class RunInterrupted(KeyboardInterrupt):
    """A run stopped on request, after a checkpoint; `signal_number` says by which signal."""

    def __init__(self, signal_number: int, text: str) -> None:
        super().__init__(signal_number, text)
        self.signal_number = signal_number

    def __str__(self) -> str:
        return str(self.args[1])


class SearchInterrupted(RunInterrupted):
    """A search stopped on request."""


class TrainingInterrupted(RunInterrupted):
    """A training stopped on request."""


class RunFailed(RuntimeError):
    """The run cannot go on: loss not finite, out of memory, disk full, processes diverged. Checkpoints are kept."""


class ProcessFailed(RuntimeError):
    """Another process of the same run failed or ended; what went wrong is its message."""


class StopRequest:
    """Within a `with` block SIGINT and SIGTERM only set `signal_number`; a second one interrupts at once.

    Outside the main thread signals cannot be taken over, and nothing is changed.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number
