"""A training that takes a second: a tiny network on fake images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from search_cases import tiny_space
from tfnas.architecture import Architecture, Op, save_architecture
from tfnas.space_io import load_space
from tfnas.train_config import TRAIN, TrainConfig


def tiny_architecture(folder: Path, **changes: Any) -> Architecture:
    """Every stage at full depth, candidates in turn, narrowest widths; its space's file goes to `folder`."""
    space = load_space(tiny_space(folder, **changes))
    stages = []
    for layers in space.layers_of_stage:
        ops = []
        for layer in layers:
            candidate = layer.index % len(layer.candidates)
            ops.append(Op.of(layer, candidate, layer.min_width(candidate) + 1))
        stages.append(tuple(ops))
    return Architecture(space, tuple(stages))


def train_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Configuration of the tiny training; its architecture goes to `folder`. `optimizer__lr=1`: `optimizer.lr`."""
    save_architecture(folder / "architecture.json", tiny_architecture(folder), seed=7)
    values: dict[str, Any] = {
        "architecture": str(folder / "architecture.json"),
        "data": "fake",
        "epochs": 3,
        "batch_size": 8,
        "accumulation_steps": 2,
        "validation": "held_out",
        "ema_decay": 0.8,
        "output": str(folder / "run"),
        "device": "cpu",
        "threads": 1,
        "dataset": {"fake_images_per_class": 14, "classes": 4},
        "optimizer": {"lr": 0.1, "warmup_epochs": 0.5},
        "regularization": {"dropout": 0.2, "drop_connect": 0.3},
        "checkpoint": {"every_s": None},
        "log": {"every_steps": 2},
    }
    for key, value in changes.items():
        group, _, leaf = key.rpartition("__")
        target = values.setdefault(group, {}) if group else values
        target[leaf] = value
    return values


def train_config(folder: Path, **changes: Any) -> TrainConfig:
    """`train_values` as a configuration."""
    return TRAIN.from_dict(train_values(folder, **changes))
