"""Who is told what a run does: callbacks, and the reporter that writes records down and hands them on.

`docs/tracking.md` shows callbacks for experiment trackers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfnas.run import METRICS_FILE, MetricsFile

Record = dict[str, Any]


# They are the other figures' position, not figures.
_POSITIONS = frozenset({"epoch", "epochs", "step"})


def scalars(record: Record) -> dict[str, float]:
    """All numbers of a record by names for a tracker, those of nested records too: `epoch/loss`, `end/test/top1`.

    Without the step and epoch they belong to, without lists (`metrics.jsonl` and the report have these).
    """
    return _scalars(record, record["kind"])


def _scalars(record: Record, prefix: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= _scalars(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key not in _POSITIONS:
            found[f"{prefix}/{key}"] = value
    return found


class Callback:
    """Receives the records of a search or a training; override what you need.

    Records are plain dicts, the same as the lines of `metrics.jsonl`; `kind` says which they are. An exception in a
    callback does not end the run: it becomes a RuntimeWarning, and that callback gets nothing more but `close`. With
    several processes only the first one's callbacks are told anything.
    """

    def on_config(self, config: dict[str, Any]) -> None:
        """First of all: the complete configuration, nested plain values; `output` is the run's folder."""

    def on_start(self, record: Record) -> None:
        """The run begins or goes on at `step`: target, reachable range, steps, engine, versions (`kind` "start")."""

    def on_step(self, record: Record) -> None:
        """`log.every_steps` more steps are done (`kind` "step")."""

    def on_epoch(self, record: Record) -> None:
        """An epoch is done (`kind` "epoch")."""

    def on_end(self, record: Record) -> None:
        """The result is written (`kind` "end"). Not called for a run that was stopped or failed."""

    def on_message(self, text: str) -> None:
        """A remark or a warning for people."""

    def close(self) -> None:
        """The run has ended, by whatever cause. Called once."""


class Reporter:
    """Appends records to `metrics.jsonl` and tells the callbacks, in their order; `mute`, it does neither."""

    def __init__(self, callbacks: Sequence[Callback], mute: bool = False) -> None:
        self._all = [] if mute else list(callbacks)
        self._told = list(self._all)
        self._mute = mute
        self._metrics: MetricsFile | None = None

    def open(self, folder: Path, length_bytes: int) -> None:
        """Begin to write; what the metrics file holds beyond `length_bytes` is cut off."""
        if not self._mute:
            self._metrics = MetricsFile(folder / METRICS_FILE, length_bytes)

    def config(self, config: dict[str, Any]) -> None:
        """Tell the configuration."""
        self._tell("on_config", config)

    def record(self, record: Record, *, write: bool = True) -> None:
        """Write a record down (unless `write` is False) and tell it; its `kind` says by which hook."""
        if write and self._metrics is not None:
            self._metrics.append(record)
        self._tell(f"on_{record['kind']}", record)

    def say(self, text: str) -> None:
        """Tell a remark."""
        self._tell("on_message", text)

    def flush(self) -> int:
        """Bring the records to disk; the metrics file's length in bytes."""
        return self._metrics.flush() if self._metrics is not None else 0

    def close(self) -> None:
        """Close the file and all callbacks, those that failed too."""
        if self._metrics is not None:
            self._metrics.close()
        self._told = list(self._all)
        self._tell("close")

    def _tell(self, hook: str, *values: Any) -> None:
        for callback in list(self._told):
            try:
                getattr(callback, hook)(*values)
            except Exception as error:
                self._told.remove(callback)
                warnings.warn(
                    f"callback {type(callback).__name__}.{hook} failed and gets no more records; the run goes on: "
                    f"{type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=3,
                )
