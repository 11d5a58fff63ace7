"""Runs to be killed, how each is started and resumed, and what two ends must have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from search_cases import assert_equal_bits, tiny_values
from tfnas.checkpoint import PREVIOUS, load_checkpoint
from tfnas.files import read_json
from tfnas.run import read_metrics
from tfnas.weights import read_weights
from train_cases import train_values
from warm import Ended, WarmParent

_TIMES = ("images_per_s", "time_left_s", "seconds", "date", "measured_latency_ms")
_PATHS = ("output", "folder", "space", "architecture", "architecture_file", "weights_file")


@dataclass(frozen=True)
class Run:
    """A `tfnas` command and the configuration file that it takes."""

    command: str
    config: Path

    def start(self, warm: WarmParent, folder: Path, **kill: Any) -> Ended:
        """Begin or go on in `folder`, as a job that is started again after every crash does; see `WarmParent.run`."""
        return warm.run([self.command, f"--config={self.config}", f"--output={folder}", "--resume"], folder, **kill)

    def finish(self, warm: WarmParent, folder: Path) -> dict[str, Any]:
        """Go on to the end in `folder`; what is there then."""
        ended = self.start(warm, folder)
        assert ended.code == 0, ended.output
        return end_of(folder)


def short_search(folder: Path, **changes: Any) -> Run:
    """A second on one core, a checkpoint each step; the space and the table go to `folder`."""
    return _run("search", folder, tiny_values, {"checkpoint__every_steps": 1, "log__every_steps": 1} | changes)


def short_training(folder: Path, **changes: Any) -> Run:
    """As `short_search`, a training."""
    return _run("train", folder, train_values, {"checkpoint__every_steps": 1, "log__every_steps": 1} | changes)


def search_of_targets(folder: Path) -> Run:
    """Two targets after one warm-up, inside the range that the synthetic table gives."""
    short = {"epochs": 2, "warmup_epochs": 1, "steps_per_epoch": 1}
    return short_search(folder, target_latency_ms=[2.0, 2.8], tolerance=0.05, **short)


def measured_search(folder: Path) -> Run:
    """A search that measures its latency table first."""
    profile = {"profile__budget_s": 0.1, "profile__batch_size": 1}
    return short_search(folder, lut=None, epochs=1, warmup_epochs=0, steps_per_epoch=2, **profile)


def with_table(run: Run, table: Path) -> Run:
    """`run` with a table given, in a configuration file beside its own."""
    config = run.config.with_name("with_table.yaml")
    values = yaml.safe_load(run.config.read_text()) | {"lut": str(table)}
    config.write_text(yaml.safe_dump(values))
    return Run(run.command, config)


def _run(command: str, folder: Path, values: Callable[..., dict[str, Any]], changes: dict[str, Any]) -> Run:
    folder.mkdir()
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values(folder, **changes)))
    return Run(command, config)


def end_of(folder: Path) -> dict[str, Any]:
    """All that a finished run left, less times and paths: names of files, tensors, numbers."""
    names = sorted(path.name for path in folder.iterdir())
    end: dict[str, Any] = {
        # a run that went on at its end has written no second checkpoint
        "names": [name for name in names if name != PREVIOUS],
        "weights": {name: read_weights(folder / name) for name in names if name.endswith(".safetensors")},
        "documents": {name: _plain(read_json(folder / name)) for name in names if name.endswith(".json")},
        "runs": {name: end_of(folder / name) for name in names if (folder / name).is_dir()},
    }
    if not end["runs"]:
        end["state"], remarks = load_checkpoint(folder)
        assert remarks == []
        end["state"].pop("metrics_bytes")  # times have more or fewer digits
        end["metrics"] = [_plain(record) for record in read_metrics(folder / "metrics.jsonl")]
    return end


def assert_same_end(end: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal in all that `end_of` gives, tensors bit for bit."""
    assert_equal_bits(end, expected)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key not in _TIMES and key not in _PATHS}
    return [_plain(item) for item in value] if isinstance(value, list) else value
