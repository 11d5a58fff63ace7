"""Images that cannot be used, through the commands: one message, exit code 2, before the first step where possible."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import image_folder
from kill_cases import Run, short_search, short_training
from tfnas.checkpoint import has_checkpoint, load_checkpoint
from tfnas.cli import main
from tfnas.cli.codes import BAD_INPUT, FAILED, OK
from tfnas.run import read_metrics

pytest.importorskip("torchvision")

RUNS: dict[str, Callable[..., Run]] = {"search": short_search, "train": short_training}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "images", 10)


def call(run: Run, folder: Path, *more: str) -> int:
    return main([run.command, f"--config={run.config}", f"--output={folder}", *more])


def on_images(kind: str, tmp_path: Path, images: Path, **changes: Any) -> Run:
    dataset = {"color_jitter": [0.0, 0.0, 0.0, 0.0], "held_out_fraction": 0.2}
    extra = {"warmup_epochs": 1} if kind == "search" else {"accumulation_steps": 1}
    return RUNS[kind](tmp_path / kind, data=str(images), epochs=1, dataset=dataset, **extra, **changes)


def _empty_class(images: Path) -> str:
    (images / "otter").mkdir()
    return "expected images of class otter"


def _single_image(images: Path) -> str:
    for path in sorted((images / "dog").iterdir())[1:]:
        path.unlink()
    return "class 'dog': expected at least 2 images (one to train on, one held out), got 1"


def _zero_bytes(images: Path) -> str:
    (images / "dog/image 03.png").write_bytes(b"")
    return "image 03.png: expected an image file, got an empty one"


def _no_images(images: Path) -> str:
    for path in images.rglob("*.png"):
        path.unlink()
    return "expected images of class cat"


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("spoil", [_empty_class, _single_image, _zero_bytes, _no_images])
def test_found_before_the_first_step(
    kind: str, spoil: Callable[[Path], str], tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And once the images are mended, the same command works: the folder was not taken."""
    kept = {path: path.read_bytes() for path in images.rglob("*.png")}
    said = spoil(images)
    run = on_images(kind, tmp_path, images)
    assert call(run, tmp_path / "run") == BAD_INPUT
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    for path, body in kept.items():
        path.write_bytes(body)
    if (images / "otter").is_dir():
        (images / "otter").rmdir()
    assert call(run, tmp_path / "run") == OK


@pytest.mark.parametrize("kind", RUNS)
def test_a_label_outside_the_classes(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.arange(40) % 4
    labels[7] = 9
    np.savez(
        tmp_path / "x.npz",
        images=np.zeros((40, 8, 8), np.uint8),
        labels=labels,
        class_names=np.array(["a", "b", "c", "d"]),
    )
    run = RUNS[kind](tmp_path / kind, data=str(tmp_path / "x.npz"))
    assert call(run, tmp_path / "run") == BAD_INPUT
    assert "labels: expected labels in 0..3, got 9 at image 7" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "workers"), [("search", 1), ("train", 0)])
def test_a_damaged_image_stops_the_run_and_is_named(
    kind: str, workers: int, tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoints so far are kept; when it is mended, the run goes on; left out on request, it is counted."""
    damaged = [images / "dog/image 02.png", images / "cat/image 07.png"]
    kept = [path.read_bytes() for path in damaged]
    for path, body in zip(damaged, kept, strict=True):
        path.write_bytes(body[: len(body) // 2])
    run = on_images(kind, tmp_path, images)
    more = [f"--dataset.workers={workers}"]
    assert call(run, tmp_path / "run", *more) == BAD_INPUT
    err = capsys.readouterr().err
    assert any(str(path) in err for path in damaged)
    assert "skip_bad_images" in err

    assert call(run, tmp_path / "skipped", "--dataset.skip_bad_images=true", *more) == OK
    out = capsys.readouterr().out
    assert all(f"left out: {path}" in out for path in damaged)
    assert "warning: 2 image files left out" in out
    assert read_metrics(tmp_path / "skipped" / "metrics.jsonl")[0]["skipped_images"] == 2

    for path, body in zip(damaged, kept, strict=True):
        path.write_bytes(body)
    assert call(run, tmp_path / "run", *more, "--resume") == OK


@pytest.mark.parametrize("kind", RUNS)
def test_a_worker_killed_for_want_of_memory(
    kind: str, tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = on_images(kind, tmp_path, images)
    from tfnas.loop import RunLoop

    original = RunLoop._checkpoint

    def checkpoint_and_kill(loop: RunLoop) -> None:
        original(loop)
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join()

    with monkeypatch.context() as patch:
        patch.setattr(RunLoop, "_checkpoint", checkpoint_and_kill)
        code = call(run, tmp_path / "run", "--dataset.workers=1")
    err = capsys.readouterr().err
    assert has_checkpoint(tmp_path / "run")
    assert code == FAILED, err
    assert "DataLoader worker (pid" in err
    assert "batch_size 8" in err
    assert load_checkpoint(tmp_path / "run")[0]["step"] >= 1
    assert call(run, tmp_path / "run", "--resume") == OK


def _another_image(images: Path) -> str:
    shutil.copy(images / "dog/image 02.png", images / "dog/image 02b.png")
    return "its images is [24, 6], here [25, 6]"


def _another_class_name(images: Path) -> str:
    (images / "dog").rename(images / "wolf")
    return "its classes is ['cat', 'dog', 'red fox'], here ['cat', 'red fox', 'wolf']"


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("change", [_another_image, _another_class_name])
def test_images_that_changed_while_a_run_was_stopped(
    kind: str, change: Callable[[Path], str], tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `steps_per_epoch` given, an epoch has as many steps as before; the split and the labels are others."""
    run = on_images(kind, tmp_path, images, steps_per_epoch=2)
    assert call(run, tmp_path / "run") == OK
    said = change(images)
    assert call(run, tmp_path / "run", "--resume") == BAD_INPUT
    err = capsys.readouterr().err
    assert f"belongs to another {'search' if kind == 'search' else 'training'}: {said}" in err
