"""Searches for several targets that share the warm-up epochs: `search_targets`.

The folder: `warm-up` (a run of its own that ends with the warm-up epochs), one folder for each target
(`target-12ms`), and the comparison of what was found. Every target's folder is a run like any other, which begins as a
copy of the warm-up's; it comes to the same end, bit for bit, as a search for that target alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfnas.begin import open_run
from tfnas.callbacks import Callback, Reporter
from tfnas.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from tfnas.comparison import TargetRow, read_row, save_comparison
from tfnas.config import ConfigError, SearchConfig
from tfnas.config_io import CONFIG_FILE, SEARCH, config_to_yaml
from tfnas.files import write_text_atomically
from tfnas.interrupt import SearchInterrupted
from tfnas.pipeline import choose_device, search, warm_up
from tfnas.processes import Processes, open_processes
from tfnas.progress import default_progress
from tfnas.run import METRICS_FILE, TABLE_FILE, WARM_UP_FOLDER, MetricsFile


@dataclass(frozen=True)
class TargetsResult:
    """What was found for each target, in their order; `folder` also holds the comparison as JSON and Markdown."""

    folder: Path
    rows: tuple[TargetRow, ...]


def search_targets(config: SearchConfig, callbacks: Sequence[Callback] | None = None) -> TargetsResult:
    """Search once for every target of `config.target_latency_ms`, a list, after one warm-up; resumable as a whole.

    All targets must be in reach, or nothing is trained. The callbacks are told of the warm-up and of each search in
    turn, `on_config` to `close`; None shows progress on standard output. Raises as `search` does.
    """
    targets = config.target_latency_ms
    if not isinstance(targets, list):
        raise ConfigError(f"target_latency_ms: expected several targets, got {targets}; tfnas.search takes one")
    with ExitStack() as stack:
        processes = stack.enter_context(open_processes(choose_device(config.device)))
        folder = open_run(config, SEARCH, Path(config.space).stem, processes, stack)
        reporter = Reporter([default_progress()] if callbacks is None else callbacks, mute=not processes.is_first)
        try:
            warm = folder / WARM_UP_FOLDER
            if not processes.from_first(lambda: _is_warm(config, warm)):
                warm_up(dataclasses.replace(config, output=str(warm)), callbacks)
            for number, target in enumerate(targets, 1):
                own = target_folder(folder, target)
                if processes.from_first(lambda own=own: read_row(own)) is not None:  # type: ignore[misc]
                    continue
                reporter.say(f"target {number} of {len(targets)}: {target:g} ms")
                _search_one(config, target, warm, own, processes, callbacks)
        except SearchInterrupted as stopped:
            raise SearchInterrupted(
                stopped.signal_number, f"{stopped}, or with all targets by --resume --output {folder}"
            ) from stopped
        rows = processes.from_first(lambda: _rows(folder, targets))
        if processes.is_first:
            for remark in save_comparison(folder, rows):
                reporter.say(remark)
    return TargetsResult(folder, rows)


def target_folder(folder: Path, target_latency_ms: float) -> Path:
    """Where the search for a target goes: `folder/target-12.5ms`."""
    return folder / f"target-{str(float(target_latency_ms)).removesuffix('.0')}ms"


def _search_one(
    config: SearchConfig,
    target: float,
    warm: Path,
    own: Path,
    processes: Processes,
    callbacks: Sequence[Callback] | None,
) -> None:
    one = dataclasses.replace(config, target_latency_ms=target, output=str(own))
    processes.from_first(lambda: _begin(one, warm, own))
    search(dataclasses.replace(one, resume=True), callbacks)


def _is_warm(config: SearchConfig, warm: Path) -> bool:
    """Whether the warm-up is done, so that not even its data need be read again."""
    if not config.resume or not has_checkpoint(warm):
        return False
    state, _ = load_checkpoint(warm)
    return bool(state["step"] >= config.warmup_epochs * state["steps_per_epoch"])


def _begin(config: SearchConfig, warm: Path, own: Path) -> None:
    """Make the folder of one target's run as that run itself would have left it after its warm-up, all or nothing."""
    if own.exists():
        return
    new = own.with_name(f".{own.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    write_text_atomically(new / CONFIG_FILE, config_to_yaml(config))
    shutil.copyfile(warm / TABLE_FILE, new / TABLE_FILE)
    if has_checkpoint(warm):
        state, _ = load_checkpoint(warm)
        own_values = {"target_latency_ms": config.target_latency_ms, "output": config.output}
        metrics = MetricsFile(new / METRICS_FILE)
        for record in _records(warm / METRICS_FILE, state["metrics_bytes"]):
            metrics.append(_retold(record, own_values))
        state |= {"target_latency_ms": config.target_latency_ms, "metrics_bytes": metrics.flush()}
        metrics.close()
        save_checkpoint(new, state)
    os.replace(new, own)


def _records(path: Path, length_bytes: int) -> list[dict[str, Any]]:
    """The records that a checkpoint vouches for."""
    return [json.loads(line) for line in path.read_bytes()[:length_bytes].splitlines()]


def _retold(record: dict[str, Any], own_values: dict[str, Any]) -> dict[str, Any]:
    """A record of the warm-up as the run for one target would have written it."""
    known = {key: value for key, value in own_values.items() if key in record}
    if record["kind"] == "start":
        known["all_targets_ms"] = None
    return record | known


def _rows(folder: Path, targets: list[float]) -> tuple[TargetRow, ...]:
    rows = [read_row(target_folder(folder, target)) for target in targets]
    return tuple(row for row in rows if row is not None)
