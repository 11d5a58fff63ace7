"""Batches of one where batch norm has one value per channel: dropped at an epoch's end, refused if asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from kill_cases import Run, short_search, short_training
from latency_tables import synthetic_table
from search_cases import tiny_space
from tfnas.architecture import save_architecture
from tfnas.cli import main
from tfnas.cli.codes import BAD_INPUT, OK
from tfnas.latency.lut_io import save_table
from tfnas.run import read_metrics
from tfnas.space_io import load_space
from train_cases import tiny_architecture

from tfnas_ext._native import MODULE

RUNS: dict[str, Callable[..., Run]] = {"search": short_search, "train": short_training}
NATIVE = pytest.mark.skipif(MODULE is None, reason="the native module is not built")


def to_one_pixel(kind: str, folder: Path, **changes: Any) -> Run:
    """27 images of 2 pixels, which the tiny space brings down to one, and 11 test images, of two classes."""
    values = {
        "epochs": 1,
        "steps_per_epoch": None,
        "batch_size": 4,
        "dataset": {"held_out_fraction": 0.2, "evaluation_batch_size": 5},
    }
    values |= {"warmup_epochs": 0} if kind == "search" else {"accumulation_steps": 1}
    run = RUNS[kind](folder, **(values | changes))
    space = load_space(tiny_space(folder, resolution=2))
    assert space.out_resolution == 1
    save_table(folder / "table.json", synthetic_table(space))
    save_architecture(folder / "architecture.json", tiny_architecture(folder, resolution=2))
    arrays = {}
    for name, count in (("train", 27), ("test", 11)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
        arrays |= {f"{name}_images": pixels, f"{name}_labels": np.arange(count) % 2}
    np.savez(folder / "images.npz", **arrays)
    run.config.write_text(yaml.safe_dump(yaml.safe_load(run.config.read_text()) | {"data": str(folder / "images.npz")}))
    return run


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("search", "reference"),
        pytest.param("search", "native", marks=NATIVE),
        ("train", "eager"),
        pytest.param("train", "fused", marks=NATIVE),
    ],
)
def test_a_last_batch_of_one(kind: str, engine: str, tmp_path: Path) -> None:
    """Of 27 images 21 train in fours and 6 are held out in fives. Where alpha learns it is dropped, else counted."""
    lr = {"weights__lr": 0.01} if kind == "search" else {"optimizer__lr": 0.01}
    run = to_one_pixel(kind, tmp_path / kind, engine=engine, log__every_steps=1, **lr)
    folder = tmp_path / "run"
    assert main([kind, f"--config={run.config}", f"--output={folder}"]) == OK
    records = read_metrics(folder / "metrics.jsonl")
    start, epoch, end = records[0], records[-2], records[-1]
    held_out = start["held_out_images" if kind == "search" else "validation_images"]
    assert (start["train_images"], held_out, epoch["step"]) == (21, 6, 5)
    if kind == "search":
        assert epoch["held_out_accuracy"] in [right / 5 for right in range(6)]
    else:
        assert (epoch["validation"]["images"], end["test"]["images"]) == (6, 11)


@pytest.mark.parametrize(
    ("kind", "key"),
    [("search", "batch_size"), ("search", "dataset.evaluation_batch_size"), ("train", "batch_size")],
)
def test_batches_of_one_are_refused_before_the_first_step(
    kind: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = to_one_pixel(kind, tmp_path / kind)
    folder = tmp_path / "run"
    assert main([kind, f"--config={run.config}", f"--output={folder}", f"--{key}=1"]) == BAD_INPUT
    assert f"{key}: expected at least 2, got 1" in capsys.readouterr().err
    assert not (folder / "metrics.jsonl").exists()
