"""Finding a network and its weights: in the folder of a training or a search, or in files."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfnas.architecture import Architecture, load_architecture
from tfnas.config import ConfigError, DatasetConfig
from tfnas.config_io import CONFIG_FILE
from tfnas.data import DataBundle
from tfnas.fields import describe
from tfnas.run import ARCHITECTURE_FILE, TABLE_FILE, TRAINING_FOLDER, targets_hint
from tfnas.train_config import TRAIN, TrainConfig

NAMED_WEIGHTS = ("best", "last")
IMAGES_FACTS = ("classes", "mean", "std")


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
            f"{targets_hint(folder)}"
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


def images_facts(data: DataBundle) -> dict[str, str]:
    """What the weights of a network presuppose of its images, for `save_weights`: `IMAGES_FACTS` as JSON lists."""
    values = data.train.normalisation
    facts = zip(IMAGES_FACTS, (data.class_names, values.mean, values.std), strict=True)
    return {name: json.dumps(list(value)) for name, value in facts}


def with_facts(dataset: DatasetConfig, facts: Mapping[str, str]) -> DatasetConfig:
    """`dataset` with the mean and deviation that the network was trained with, where its weights tell them."""
    if "mean" not in facts or "std" not in facts:
        return dataset
    return dataclasses.replace(dataset, mean=_list(facts, "mean"), std=_list(facts, "std"))


def require_classes(data: DataBundle, name: str, facts: Mapping[str, str]) -> None:
    """Raise `ValueError` where a class has another number in `data`, called `name`, than the weights were trained for.

    Names that the training did not know may be other words for the same classes.
    """
    trained = _list(facts, "classes") if "classes" in facts else []
    for number, given in enumerate(data.class_names):
        if given in trained and trained.index(given) != number:
            known = ", ".join(map(str, trained[:10])) + (", ..." if len(trained) > 10 else "")
            raise ValueError(
                f"data {name}: class {given!r} is number {number} there, and was {trained.index(given)} in training "
                f"({known}); bring the classes into one order"
            )


def _list(facts: Mapping[str, str], name: str) -> list[Any]:
    try:
        value = json.loads(facts[name])
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise ValueError(f"{name} in the weights' header: expected a JSON list, got {describe(facts[name])}")
    return value
