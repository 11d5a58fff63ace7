"""Interrupted and resumed runs equal uninterrupted ones, bit for bit."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from search_cases import assert_equal_bits, results_of, tiny_config, tiny_file
from tfnas import Callback, search
from tfnas.callbacks import Record
from tfnas.checkpoint import LATEST, CheckpointError, has_checkpoint, load_checkpoint, save_checkpoint
from tfnas.cli import run_command
from tfnas.config import ConfigError, SearchConfig
from tfnas.interrupt import SearchInterrupted, StopRequest

KILLS = 100 if os.environ.get("TFNAS_SLOW") == "1" else 3


def _reference(folder: Path, **changes: object) -> dict[str, object]:
    folder.mkdir()
    search(tiny_config(folder, **changes), [])
    return results_of(folder / "run")


class _Stop(Callback):
    """Sends this process a signal at a step."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def on_step(self, record: Record) -> None:
        if record["step"] == self.step:
            os.kill(os.getpid(), self.number)


def _equal(first: dict[str, object], second: dict[str, object]) -> None:
    for results in (first, second):
        results["metrics"][0].pop("space", None)  # type: ignore[index]
    assert_equal_bits(first, second)


@pytest.mark.parametrize("step", [1, 4, 5, 8, 10, 11, 12])
def test_ctrl_c_and_resume(tmp_path: Path, step: int) -> None:
    """Within an epoch, at its end, at the next one's start, at the very end."""
    expected = _reference(tmp_path / "whole", log__every_steps=1)
    config = tiny_config(tmp_path, log__every_steps=1)
    with pytest.raises(SearchInterrupted) as stopped:
        search(config, [_Stop(step)])
    assert stopped.value.signal_number == signal.SIGINT
    assert "--resume" in str(stopped.value)
    assert load_checkpoint(tmp_path / "run")[0]["step"] == step
    assert not (tmp_path / "run" / "architecture.json").exists()
    search(dataclasses.replace(config, resume=True), [])
    _equal(results_of(tmp_path / "run"), expected)


def test_exit_codes_of_signals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        folder = tmp_path / str(code)
        folder.mkdir()
        file = tiny_file(folder)
        monkeypatch.setattr("tfnas.begin.default_progress", lambda wording, number=number: _Stop(2, number))
        assert run_command("search", ["--config", str(file)]) == code
        assert load_checkpoint(folder / "run")[0]["step"] == 2


def _wait_for_checkpoints(process: multiprocessing.process.BaseProcess, path: Path, count: int) -> None:
    """Return when `path` has been replaced `count` times, or the process has ended."""

    def version() -> int:
        try:
            return path.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    last = version()
    while count > 0 and process.is_alive():
        time.sleep(0.001)
        if version() not in (0, last):
            last, count = version(), count - 1


def test_kill_and_resume(tmp_path: Path) -> None:
    """SIGKILL at random moments, again and again; what goes on is the same search. `TFNAS_SLOW=1` kills 100 times."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    expected = _reference(tmp_path / "whole", epochs=4, log__every_steps=1)
    config = tiny_config(tmp_path, epochs=4, log__every_steps=1, checkpoint__every_steps=3, resume=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tfnas.pipeline"])
    killed: list[int] = []
    while len(killed) < KILLS:
        process = context.Process(target=search, args=(config, []))
        process.start()
        _wait_for_checkpoints(process, Path(config.output) / LATEST, rng.randint(0, 3))
        process.join(timeout=rng.random() * 0.1)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        killed.append(load_checkpoint(config.output)[0]["step"] if has_checkpoint(config.output) else 0)
        if process.exitcode == 0:
            _equal(results_of(tmp_path / "run"), expected)
            shutil.rmtree(config.output)
    search(config, [])
    print("steps of the last checkpoint at each kill", killed)
    _equal(results_of(tmp_path / "run"), expected)


def test_resume_of_a_finished_run_gives_the_same_again(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, epochs=1, warmup_epochs=0)
    search(config, [])
    expected = results_of(tmp_path / "run")
    search(dataclasses.replace(config, resume=True), [])
    assert_equal_bits(results_of(tmp_path / "run"), expected)


def test_resume_takes_over_the_number_of_threads(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, threads=None, log__every_steps=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(SearchInterrupted):
            search(config, [_Stop(5)])
        torch.set_num_threads(1)
        search(dataclasses.replace(config, resume=True), [])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def _interrupted(folder: Path) -> SearchConfig:
    config = tiny_config(folder, log__every_steps=1)
    with pytest.raises(SearchInterrupted):
        search(config, [_Stop(6)])
    return dataclasses.replace(config, resume=True)


def test_truncated_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    expected = _reference(tmp_path / "whole", log__every_steps=1)
    config = _interrupted(tmp_path)
    latest = tmp_path / "run" / LATEST
    latest.write_bytes(latest.read_bytes()[:-1000])
    search(config, [])
    _equal(results_of(tmp_path / "run"), expected)


def test_checkpoint_of_another_space_is_refused(tmp_path: Path) -> None:
    config = _interrupted(tmp_path)
    state, _ = load_checkpoint(tmp_path / "run")
    state["space"] = dict(state["space"], head_channels=17)
    save_checkpoint(tmp_path / "run", state)
    with pytest.raises(CheckpointError, match="space"):
        search(config, [])


def test_resume_with_another_seed_is_refused(tmp_path: Path) -> None:
    config = _interrupted(tmp_path)
    with pytest.raises(ConfigError, match="seed: 0 in the run, now 5"):
        search(dataclasses.replace(config, seed=5), [])


def test_second_signal_interrupts_at_once() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
