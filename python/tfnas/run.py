"""The folder of a run: one process at a time, complete configuration, metrics that follow the checkpoints.

runs/<name>/: `config.yaml` (complete), `lut.json`, `metrics.jsonl` (one JSON object a line), `checkpoint.pt` and
`checkpoint.previous.pt`, and at the end `architecture.json`.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from tfnas.checkpoint import has_checkpoint
from tfnas.config import ConfigError
from tfnas.config_io import SEARCH, ConfigKind, config_to_dict, config_to_yaml
from tfnas.files import write_text_atomically

CONFIG_FILE = "config.yaml"
TABLE_FILE = "lut.json"
METRICS_FILE = "metrics.jsonl"
ARCHITECTURE_FILE = "architecture.json"
LOCK_FILE = ".lock"
# What a resumed run may change without becoming another run.
FREE_KEYS = ("output", "resume", "dataset.workers", "checkpoint.every_steps", "checkpoint.every_s")


class RunConfig(Protocol):
    """What a run's configuration, a dataclass, says about its folder."""

    output: str | None
    resume: bool


class RunFolder:
    """A run's folder, locked against a second process for as long as it is open (a killed process frees it)."""

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def open(cls, config: RunConfig, kind: ConfigKind[Any] = SEARCH, stem: str = "run") -> RunFolder:
        """Make or take over the folder `config.output` names (null: `runs/<stem>-<date>-<time>`).

        `kind` reads the configuration that a run left there.

        Raises `ConfigError` where the folder belongs to a run and `resume` is off, where another process works in it,
        or where the run to be resumed has another configuration (the keys are named); `OSError` where the folder
        cannot be written.
        """
        path = Path(config.output) if config.output else _fresh_name(stem)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"output {path} is a file; name a folder")
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path, _lock(path))
        try:
            folder._check(config, kind)
            write_text_atomically(path / CONFIG_FILE, config_to_yaml(config))
        except BaseException:
            folder.close()
            raise
        return folder

    def _check(self, config: RunConfig, kind: ConfigKind[Any]) -> None:
        stored = self.path / CONFIG_FILE
        if not config.resume:
            taken = [name for name in (CONFIG_FILE, METRICS_FILE, ARCHITECTURE_FILE) if (self.path / name).exists()]
            if taken or has_checkpoint(self.path):
                raise ConfigError(
                    f"output {self.path} already holds a run; "
                    "go on with it by --resume, or name another folder by --output"
                )
        elif stored.exists():
            changed = changed_keys(kind.load(stored), config)
            if changed:
                lines = "\n".join(f"  {key}: {old!r} in the run, now {new!r}" for key, old, new in changed)
                raise ConfigError(f"--resume: the run in {self.path} has another configuration:\n{lines}")

    def close(self) -> None:
        """Let another process work in the folder."""
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MetricsFile:
    """`metrics.jsonl`: appended line by line, cut back to a checkpoint's length on resume."""

    def __init__(self, path: Path, length_bytes: int = 0) -> None:
        self._file = open(path, "ab")  # noqa: SIM115 - held until close()
        self._file.truncate(length_bytes)

    def append(self, record: dict[str, Any]) -> None:
        """Add one record as a line of JSON (NaN and infinities are refused)."""
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")

    def flush(self) -> int:
        """Bring what was appended to disk; returns the file's length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Records of a `metrics.jsonl`; an incomplete last line (a killed run) is left out."""
    lines = Path(path).read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


def changed_keys(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of every key that differs and makes it another run."""
    before, after = _flat(config_to_dict(old)), _flat(config_to_dict(new))
    return [(key, before[key], after[key]) for key in before if before[key] != after[key] and key not in FREE_KEYS]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _fresh_name(stem: str) -> Path:
    stem = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = Path("runs") / stem, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{stem}-{number}"
    return path


def _lock(path: Path) -> IO[str]:
    lock = open(path / LOCK_FILE, "w")  # noqa: SIM115 - held until close()
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(
            f"output {path}: another process is at work there; wait for it or name another folder"
        ) from None
    except OSError as error:
        warnings.warn(
            f"{path}: this file system has no locks ({error}); keep other runs out of the folder", stacklevel=2
        )
    return lock
