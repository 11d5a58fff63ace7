"""A search that takes a second: a tiny space, fake images, a synthetic table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from latency_tables import synthetic_table
from tfnas.checkpoint import load_checkpoint
from tfnas.config import SearchConfig
from tfnas.config_io import SEARCH
from tfnas.latency.lut_io import save_table
from tfnas.run import read_metrics
from tfnas.space import Space
from tfnas.space_io import load_space

TINY_SPACE: dict[str, Any] = {
    "base": "small",
    "name": "tiny",
    "resolution": 8,
    "num_classes": 4,
    "stem_channels": 4,
    "fixed_channels": 4,
    "fixed_se_channels": 0,
    "stages": [
        {"out_channels": 6, "depth": 2, "stride": 2, "act": "relu"},
        {"out_channels": 8, "depth": 2, "stride": 1, "act": "swish"},
    ],
    "candidates": ["k3_e3", "k5_e3_se1", "k3_e6"],
    "head_channels": 16,
}


def tiny_space(folder: Path, **changes: Any) -> Path:
    """The tiny space's YAML file in `folder`."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY_SPACE | changes))
    return path


def tiny_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Configuration of the tiny search; its space and table go to `folder`. `weights__lr=1` changes `weights.lr`."""
    space_path = tiny_space(folder)
    space: Space = load_space(space_path)
    table_path = folder / "table.json"
    save_table(table_path, synthetic_table(space))
    values: dict[str, Any] = {
        "space": str(space_path),
        "data": "fake",
        "lut": str(table_path),
        "epochs": 3,
        "warmup_epochs": 1,
        "steps_per_epoch": 4,
        "batch_size": 8,
        "output": str(folder / "run"),
        "engine": "reference",
        "device": "cpu",
        "threads": 1,
        "dataset": {"fake_images_per_class": 20},
        "log": {"every_steps": 2},
        "checkpoint": {"every_s": None},
    }
    for key, value in changes.items():
        group, _, leaf = key.rpartition("__")
        target = values.setdefault(group, {}) if group else values
        target[leaf] = value
    return values


def tiny_config(folder: Path, **changes: Any) -> SearchConfig:
    """`tiny_values` as a configuration."""
    return SEARCH.from_dict(tiny_values(folder, **changes))


def tiny_file(folder: Path, **changes: Any) -> Path:
    """`tiny_values` as a YAML file."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_values(folder, **changes)))
    return path


def command(*arguments: str) -> list[str]:
    """`tfnas search ...` in a process of its own."""
    return [sys.executable, "-m", "tfnas", "search", *arguments]


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `tfnas search ...` to its end."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, env=env, timeout=120)


TIMES = ("images_per_s", "time_left_s", "seconds", "date", "measured_latency_ms", "output", "architecture_file")


def results_of(folder: Path) -> dict[str, Any]:
    """What two equal runs have in common: architecture, metrics and the last checkpoint, less times and paths."""
    architecture = json.loads((folder / "architecture.json").read_text())
    records = read_metrics(folder / "metrics.jsonl")
    state, _ = load_checkpoint(folder)
    state.pop("metrics_bytes")
    return {
        "architecture": _without_times(architecture),
        "metrics": [_without_times(record) for record in records],
        "state": state,
    }


def assert_equal_bits(a: Any, b: Any, where: str = "") -> None:
    """Equal structures, tensors bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal_bits(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


def _without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMES}
