"""The folder of a run: one process at a time, complete configuration, metrics that follow the checkpoints.

runs/<name>/: `config.yaml` (complete), `lut.json`, `metrics.jsonl` (one JSON object a line), `checkpoint.pt` and
`checkpoint.previous.pt`, and at the end `architecture.json`.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from tfnas.checkpoint import has_checkpoint
from tfnas.config import ConfigError
from tfnas.config_io import CONFIG_FILE, SEARCH, ConfigKind, config_to_dict, config_to_yaml
from tfnas.fields import describe
from tfnas.files import remove_unfinished, write_text_atomically
from tfnas.locks import hold

TABLE_FILE = "lut.json"
PARTIAL_TABLE_FILE = "lut.partial.json"
METRICS_FILE = "metrics.jsonl"
ARCHITECTURE_FILE = "architecture.json"
LOCK_FILE = ".lock"
WARM_UP_FOLDER = "warm-up"
TRAINING_FOLDER = "training"
# What a resumed run may change without becoming another run.
FREE_KEYS = ("output", "resume", "tensorboard", "dataset.workers", "checkpoint.every_steps", "checkpoint.every_s")


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

        Raises `ConfigError` where the folder cannot be written, where it belongs to a run and `resume` is off, where
        another process works in it, or where the run to be resumed is not named, or has another configuration (the keys
        are named).
        """
        if config.resume and not config.output:
            raise ConfigError("--resume needs --output, the folder of the run to go on with")
        try:
            path = _make_folder(Path(config.output)) if config.output else _make_fresh_folder(stem)
            lock = _lock(path)
        except OSError as error:
            where = config.output or "runs"
            raise ConfigError(
                f"output {where} cannot be written ({error.strerror}); name another folder by --output"
            ) from None
        folder = cls(path, lock)
        try:
            remove_unfinished(path)
            folder._check(config, kind)
            write_text_atomically(path / CONFIG_FILE, config_to_yaml(config))
        except BaseException:
            folder.close()
            raise
        return folder

    def _check(self, config: RunConfig, kind: ConfigKind[Any]) -> None:
        stored = self.path / CONFIG_FILE
        if not any(_has_begun(path) for path in (self.path, self.path / WARM_UP_FOLDER)):
            return
        if not config.resume:
            raise ConfigError(
                f"output {self.path} already holds a run; go on with it by --resume, or name another folder by --output"
            )
        if stored.exists():
            changed = changed_keys(kind.load(stored), config)
            if changed:
                lines = "\n".join(f"  {key}: {old!r} in the run, now {new!r}" for key, old, new in changed)
                raise ConfigError(f"--resume: the run in {self.path} has another configuration:\n{lines}")
        elif has_checkpoint(self.path):
            raise ConfigError(
                f"--resume: the run in {self.path} has lost its {CONFIG_FILE}; write it anew by the command it began "
                f"with and --print_config > {stored}"
            )

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
    """`metrics.jsonl`: appended line by line, cut back to a checkpoint's length on resume.

    A file that somebody shortened keeps the whole lines that it has.
    """

    def __init__(self, path: Path, length_bytes: int = 0) -> None:
        if path.exists() and path.stat().st_size < length_bytes:
            length_bytes = path.read_bytes().rfind(b"\n") + 1
        # Without a buffer that a full disk would leave unwritten until close().
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - held until close()
        self._file.truncate(length_bytes)

    def append(self, record: dict[str, Any]) -> None:
        """Add one record as a line of JSON (NaN and infinities are refused)."""
        line = memoryview(json.dumps(record, allow_nan=False).encode() + b"\n")
        while line:
            line = line[self._file.write(line) :]

    def flush(self) -> int:
        """Bring what was appended to disk; returns the file's length in bytes."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Records of a `metrics.jsonl`; an incomplete last line (a killed run) is left out.

    A `ValueError` names the file and the line that is no record: a JSON object that says its `kind`.
    """
    records = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
            raise ValueError(f"{path}, line {number}: expected an object with its kind, got {describe(record)}")
        records.append(record)
    return records


def targets_hint(folder: Path) -> str:
    """For a message about `folder`: `"; name one of ..."` where it is that of a search for several targets, or ""."""
    found = sorted(path.parent.name for path in folder.glob(f"target-*/{CONFIG_FILE}"))
    return f"; it holds several searches, name one of {', '.join(found)} in it" if found else ""


def changed_keys(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of every key that differs and makes it another run."""
    before, after = _flat(config_to_dict(old)), _flat(config_to_dict(new))
    return [(key, before[key], after[key]) for key in before if before[key] != after[key] and key not in FREE_KEYS]


def _has_begun(path: Path) -> bool:
    """Whether a run left more than its configuration, as one does that failed for missing images, for example."""
    results = [METRICS_FILE, ARCHITECTURE_FILE]
    if (path / CONFIG_FILE).exists():
        results += [TABLE_FILE, PARTIAL_TABLE_FILE]
    return has_checkpoint(path) or any((path / name).exists() for name in results)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _make_folder(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output {path} is a file; name a folder")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _make_fresh_folder(stem: str) -> Path:
    """A new folder in `runs`; of two processes that ask in the same second each gets its own."""
    first = Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = first, 1
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
            path = first.with_name(f"{first.name}-{number}")


def _lock(path: Path) -> IO[str]:
    lock = hold(path / LOCK_FILE)
    if lock is None:
        raise ConfigError(f"output {path}: another process is at work there; wait for it or name another folder")
    return lock
