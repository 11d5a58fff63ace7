"""Finding a network and its weights: in the folder of a training or a search, or in files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tfnas.architecture import Architecture, load_architecture
from tfnas.config import ConfigError
from tfnas.run import ARCHITECTURE_FILE, CONFIG_FILE, TABLE_FILE
from tfnas.train_config import TRAIN, TrainConfig

TRAINING_FOLDER = "training"
NAMED_WEIGHTS = ("best", "last")


@dataclass(frozen=True)
class Found:
    """A network's architecture, where its weights are (None: nowhere), how it was trained, its search's table."""

    architecture: Architecture
    weights: Path | None
    training: TrainConfig | None
    table: Path | None


def find_in_run(folder: str | os.PathLike[str], weights: str = "best") -> Found:
    """The network of a training's folder, or of a search's: trained in its `training` folder, else untrained.

    Raises `ConfigError` where the folder is neither, or where `weights` (`best` or `last`) are not there.
    """
    folder = Path(folder)
    if not (folder / ARCHITECTURE_FILE).is_file():
        raise ConfigError(
            f"run {folder}: expected the folder of a finished search or a training, it has no {ARCHITECTURE_FILE}"
        )
    if weights not in NAMED_WEIGHTS:
        raise ConfigError(f"weights: expected {' or '.join(NAMED_WEIGHTS)} with a run, got {weights!r}")
    trained = next((f for f in (folder, folder / TRAINING_FOLDER) if (f / f"{weights}.safetensors").is_file()), None)
    table = next((f / TABLE_FILE for f in (folder, folder.parent) if (f / TABLE_FILE).is_file()), None)
    if trained is None:
        return Found(load_architecture(folder / ARCHITECTURE_FILE)[0], None, None, table)
    for name in (ARCHITECTURE_FILE, CONFIG_FILE):
        if not (trained / name).is_file():
            raise ConfigError(f"run {folder}: {trained} holds weights, but no {name}")
    return Found(
        load_architecture(trained / ARCHITECTURE_FILE)[0],
        trained / f"{weights}.safetensors",
        TRAIN.load(trained / CONFIG_FILE),
        table,
    )
