"""What a report tells, read from a run's folder."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfnas.architecture import Architecture, load_architecture
from tfnas.callbacks import Record
from tfnas.config import ConfigError
from tfnas.config_io import CONFIG_FILE
from tfnas.latency.lut import FloatArray, LatencyTable
from tfnas.latency.lut_io import load_table
from tfnas.run import ARCHITECTURE_FILE, METRICS_FILE, TABLE_FILE, TRAINING_FOLDER, read_metrics, targets_hint
from tfnas.space import Space


@dataclass(frozen=True)
class RunData:
    """A search so far. `end` is None while it has not ended, `training` empty where its network was not trained."""

    folder: Path
    architecture: Architecture
    facts: dict[str, Any]
    table: LatencyTable
    config_text: str
    start: Record
    epochs: list[Record]
    end: Record | None
    training: list[Record]

    @property
    def space(self) -> Space:
        return self.architecture.space

    def probabilities(self, key: str) -> list[FloatArray]:
        """Per epoch, `log_alpha` or `log_beta` as probabilities; 0 where there is no choice."""
        return [np.exp(np.array([[-math.inf if x is None else x for x in row] for row in e[key]])) for e in self.epochs]

    def strongest(self) -> list[list[int]]:
        """Per epoch, the strongest candidate of every layer of the supernet."""
        return [[int(np.argmax(row)) for row in alpha] for alpha in self.probabilities("log_alpha")]

    def shares_ms(self) -> list[float]:
        """Latency by the table, uncorrected, of every kept layer in ms."""
        blocks = self.architecture.keys()
        return [self.table.latency_ms(key, width) for key, width in blocks]


def read_run(folder: str | os.PathLike[str]) -> RunData:
    """Read a finished search's folder. `ConfigError` names what is missing, `ValueError` what is damaged."""
    folder = Path(folder)
    for name in (CONFIG_FILE, METRICS_FILE, TABLE_FILE, ARCHITECTURE_FILE):
        if not (folder / name).is_file():
            raise ConfigError(
                f"run {folder}: expected the folder of a finished search, it has no {name}{targets_hint(folder)}"
            )
    arch, facts = load_architecture(folder / ARCHITECTURE_FILE)
    records = read_metrics(folder / METRICS_FILE)
    start = [record for record in records if record["kind"] == "start"]
    epochs = [record for record in records if record["kind"] == "epoch"]
    if not start or not epochs:
        raise ConfigError(f"run {folder}: {METRICS_FILE} holds no finished epoch")
    ends = [record for record in records if record["kind"] == "end"]
    training = folder / TRAINING_FOLDER / METRICS_FILE
    return RunData(
        folder=folder,
        architecture=arch,
        facts=facts,
        table=load_table(folder / TABLE_FILE),
        config_text=_text(folder / CONFIG_FILE),
        start=start[-1],
        epochs=epochs,
        end=ends[-1] if ends else None,
        training=read_metrics(training) if training.is_file() else [],
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error})") from None
