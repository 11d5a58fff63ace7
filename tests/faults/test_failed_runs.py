"""Searches and trainings that fail on the way: a message that says where, exit code 1, the last good checkpoint kept.

Each one, resumed when the cause is gone, ends as if nothing had happened.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_cases import Run, assert_same_end, end_of, short_search, short_training
from search_cases import tiny_space
from tfnas.architecture import save_architecture
from tfnas.bilevel import BilevelSearch
from tfnas.checkpoint import find_not_finite, has_checkpoint, load_checkpoint
from tfnas.cli import main
from tfnas.cli.codes import BAD_INPUT, FAILED, OK
from tfnas.evaluate import Accuracy
from tfnas.run import RunFolder
from tfnas.train_loop import TrainLoop
from train_cases import tiny_architecture

RUNS: dict[str, Callable[..., Run]] = {"search": short_search, "train": short_training}
LOOPS: dict[str, type] = {"search": BilevelSearch, "train": TrainLoop}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Run, dict[str, Any]]]:
    """A run of each kind and its uninterrupted end."""
    ends = {}
    for kind, make in RUNS.items():
        folder = tmp_path_factory.mktemp("whole")
        run = make(folder / kind, epochs=2, steps_per_epoch=3)
        assert call(run, folder / "run") == OK
        ends[kind] = run, end_of(folder / "run")
    return ends


def call(run: Run, folder: Path, *more: str) -> int:
    """Begin or go on in this process; the exit code. Anything but a message is an exception here."""
    return main([run.command, f"--config={run.config}", f"--output={folder}", "--resume", *more])


def at_step(monkeypatch: pytest.MonkeyPatch, kind: str, step: int, fail: Callable[[Any], object]) -> None:
    """Let `fail` be called with the loop at the end of a step."""
    original = LOOPS[kind]._take_step  # type: ignore[attr-defined]

    def failing(loop: Any, position: int) -> None:
        original(loop, position)
        if loop.step == step:
            fail(loop)

    monkeypatch.setattr(LOOPS[kind], "_take_step", failing)


def _no_gpu_memory(loop: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _no_cpu_memory(loop: Any) -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize(("kind", "fail"), [("search", _no_cpu_memory), ("train", _no_gpu_memory)])
def test_out_of_memory(
    kind: str,
    fail: Callable[[Any], None],
    whole: dict[str, tuple[Run, dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, expected = whole[kind]
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, kind, 3, fail)
        assert call(run, tmp_path / "run") == FAILED
    err = capsys.readouterr().err
    assert err.startswith(f"tfnas {kind}: error: out of memory at step 3 with batch_size 8 (peak ")
    assert " GiB)" in err
    assert "Lower batch_size" in err
    assert load_checkpoint(tmp_path / "run")[0]["step"] == 3
    assert call(run, tmp_path / "run") == OK
    assert_same_end(end_of(tmp_path / "run"), expected)


@pytest.mark.parametrize("kind", RUNS)
def test_every_write_on_a_full_disk(
    kind: str,
    whole: dict[str, tuple[Run, dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk fills up before any one of the writes; when there is room again, the run goes on from its checkpoint."""
    run, expected = whole[kind]
    folder, original = tmp_path / "run", os.fsync
    failures = 0
    for limit in itertools.count():
        synced = 0

        def full(handle: int, limit: int = limit) -> None:
            nonlocal synced
            synced += 1
            if synced > limit:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            code = call(run, folder)
        if code == OK:
            break
        failures += 1
        err = capsys.readouterr().err
        assert code == FAILED, err
        assert err.startswith(f"tfnas {kind}: error: ")
        assert "No space left on device" in err
        assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]
        if has_checkpoint(folder):
            assert "is kept" in err
            assert f"--resume --output {folder}" in err
            load_checkpoint(folder)
    assert failures > 5
    assert_same_end(end_of(folder), expected)


@pytest.mark.parametrize("kind", RUNS)
def test_a_folder_that_becomes_read_only(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RUNS[kind](tmp_path / kind)

    def read_only(*arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "checkpoint.pt.tmp")

    at_step(monkeypatch, kind, 2, lambda loop: monkeypatch.setattr(os, "replace", read_only))
    assert call(run, tmp_path / "run") == FAILED
    assert "step 3: a file of the run cannot be written ([Errno 30] Read-only file system" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run")[0]["step"] == 2


@pytest.mark.parametrize("kind", RUNS)
def test_weights_that_overflow_after_the_last_measured_loss(
    kind: str,
    whole: dict[str, tuple[Run, dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Loss and norm are from before the update; what the update breaks must not get into a checkpoint."""
    run, expected = whole[kind]

    def overflow(loop: Any) -> None:
        weights = loop.supernet.dense_parameters() if kind == "search" else loop.parameters
        weights[0].data.view(-1)[0] = math.inf

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, kind, 2, overflow)
        assert call(run, tmp_path / "run") == FAILED
    err = capsys.readouterr().err
    assert "stem" in err
    assert "is not finite after step 2. The last good checkpoint stays in" in err
    assert load_checkpoint(tmp_path / "run")[0]["step"] == 2
    assert call(run, tmp_path / "run") == OK
    assert_same_end(end_of(tmp_path / "run"), expected)


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("lr", ["1e30", ".inf"])
def test_learning_rates_beyond_all_measure(
    kind: str, lr: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = {"search": "weights.lr", "train": "optimizer.lr"}[kind]
    run = RUNS[kind](tmp_path / kind)
    code = call(run, tmp_path / "run", f"--{key}={lr}")
    err = capsys.readouterr().err
    if lr == "1e30":
        assert (code, "is not finite" in err) == (FAILED, True)
    else:
        assert (code, key in err) == (BAD_INPUT, True)


def test_what_is_not_finite_is_named() -> None:
    good = {"log_alpha": torch.tensor([0.0, -math.inf]), "w": [torch.ones(2), torch.empty(0)], "step": 3, "x": None}
    assert find_not_finite(good) is None
    for bad in (math.inf, -math.inf, math.nan):
        assert find_not_finite({"net": good | {"w": [torch.ones(2), torch.tensor([0.0, bad])]}}) == "net.w.1"
    assert find_not_finite({"log_alpha": torch.tensor([math.nan, -math.inf])}) == "log_alpha"
    assert find_not_finite({"log_beta": torch.tensor([math.inf])}) == "log_beta"


def test_a_validation_loss_that_is_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = short_training(tmp_path / "train")
    monkeypatch.setattr("tfnas.train_loop.evaluate_network", lambda *a: Accuracy(12, math.nan, 0.25, None))
    assert call(run, tmp_path / "run") == FAILED
    assert "the validation loss after epoch 1 (step 3) is nan" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run")[0]["step"] == 2


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_at_work_is_left_alone(
    kind: str, whole: dict[str, tuple[Run, dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second command into the folder of one that is at work changes nothing there; nor does one that comes after."""
    run, _ = whole[kind]
    inside: list[tuple[int, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, kind, 2, lambda loop: inside.append((call(run, tmp_path / "run"), capsys.readouterr().err)))
        assert call(run, tmp_path / "run") == OK
    ((code, err),) = inside
    assert code == BAD_INPUT
    assert "another process is at work there" in err
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert main([run.command, f"--config={run.config}", f"--output={tmp_path / 'run'}"]) == BAD_INPUT
    assert "already holds a run; go on with it by --resume" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("kind", RUNS)
def test_checkpoints_that_cannot_be_used(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both truncated; of another space or architecture; of something else altogether."""
    run = RUNS[kind](tmp_path / kind, epochs=1, **({"warmup_epochs": 0} if kind == "search" else {}))
    folder = tmp_path / "run"
    assert call(run, folder) == OK
    good = load_checkpoint(folder)[0]
    capsys.readouterr()

    def refused(*parts: str) -> None:
        assert call(run, folder) == BAD_INPUT
        err = capsys.readouterr().err
        assert all(part in err for part in parts), err

    for key in ("space" if kind == "search" else "architecture", "steps_per_epoch"):
        torch.save(good | {key: {"head_channels": 3}}, folder / "checkpoint.pt")
        refused(f"belongs to another {kind}" if kind == "search" else "belongs to another training", key)
    for key in ("threads", "step", "sums", "supernet" if kind == "search" else "network"):
        torch.save({k: v for k, v in good.items() if k != key}, folder / "checkpoint.pt")
        refused("checkpoint", str(folder))
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (folder / name).write_bytes(b"PK\3\4 half of it")
    refused("checkpoint.pt is damaged or truncated", "checkpoint.previous.pt is damaged or truncated")
    assert (folder / "checkpoint.previous.pt").read_bytes() == b"PK\3\4 half of it"


@pytest.mark.parametrize("kind", RUNS)
def test_a_refused_resumption_changes_nothing(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The space, or the architecture, has another content under its name: every file of the run stays as it was."""
    run = RUNS[kind](tmp_path / kind, epochs=1, **({"warmup_epochs": 0} if kind == "search" else {}))
    folder = tmp_path / "run"
    assert call(run, folder) == OK
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if kind == "search":
        tiny_space(tmp_path / kind, head_channels=24)
    else:
        save_architecture(tmp_path / kind / "architecture.json", tiny_architecture(tmp_path, head_channels=24))
    assert call(run, folder) == BAD_INPUT
    assert f"belongs to another {'search' if kind == 'search' else 'training'}" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("kind", RUNS)
def test_a_lost_configuration_is_not_made_up(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it `--resume --output` alone means the default one, which must not become that of the run."""
    run = RUNS[kind](tmp_path / kind, epochs=1, **({"warmup_epochs": 0} if kind == "search" else {}))
    folder = tmp_path / "run"
    assert call(run, folder) == OK
    (folder / "config.yaml").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main([kind, "--resume", f"--output={folder}"]) == BAD_INPUT
    assert "has lost its config.yaml; write it anew" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(SystemExit):
        main([kind, f"--config={run.config}", f"--output={folder}", "--print_config"])
    (folder / "config.yaml").write_text(capsys.readouterr().out)
    assert main([kind, "--resume", f"--output={folder}"]) == OK


def test_a_lock_is_let_go_when_a_run_fails(tmp_path: Path) -> None:
    run = short_search(tmp_path / "search", data="nowhere")
    for _ in range(2):
        assert call(run, tmp_path / "run") == BAD_INPUT
    from tfnas.config_io import SEARCH

    with RunFolder.open(SEARCH.load(run.config, {"output": str(tmp_path / "run")})):
        pass
