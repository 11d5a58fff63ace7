"""Interrupted and resumed runs equal uninterrupted ones, bit for bit (killed ones: `tests/faults`)."""

from __future__ import annotations

import dataclasses
import os
import signal
import weakref
from pathlib import Path

import pytest
import torch
from search_cases import assert_equal_bits, results_of, tiny_config, tiny_file
from tfnas import Callback, pipeline, search
from tfnas import train as train_module
from tfnas.begin import stored_state
from tfnas.callbacks import Record
from tfnas.checkpoint import LATEST, CheckpointError, load_checkpoint, save_checkpoint
from tfnas.cli import run_command
from tfnas.config import ConfigError, SearchConfig
from tfnas.interrupt import SearchInterrupted, StopRequest
from train_cases import train_config


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


class _State(dict[str, object]):
    """A dict that can be referred to weakly."""


@pytest.mark.parametrize("kind", ["search", "training"])
def test_a_checkpoint_is_let_go_once_it_is_loaded(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it is as large as the run's own weights and momentum, and there may be no room for both."""
    module, run = (pipeline, search) if kind == "search" else (train_module, train_module.train)
    make = tiny_config if kind == "search" else train_config
    config = make(tmp_path, log__every_steps=1)
    with pytest.raises(KeyboardInterrupt):
        run(config, [_Stop(2)])  # type: ignore[operator]
    states: list[weakref.ref[_State]] = []
    alive: list[bool] = []

    class Watch(Callback):
        def on_step(self, record: Record) -> None:
            alive.append(states[0]() is not None)

    def stored(*arguments: object) -> _State:
        state = _State(stored_state(*arguments))  # type: ignore[arg-type]
        states.append(weakref.ref(state))
        return state

    monkeypatch.setattr(module, "stored_state", stored)
    run(dataclasses.replace(config, resume=True), [Watch()])  # type: ignore[operator,type-var]
    assert alive
    assert not any(alive)


def test_exit_codes_of_signals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        folder = tmp_path / str(code)
        folder.mkdir()
        file = tiny_file(folder)
        monkeypatch.setattr("tfnas.begin.default_progress", lambda wording, number=number: _Stop(2, number))
        assert run_command("search", ["--config", str(file)]) == code
        assert load_checkpoint(folder / "run")[0]["step"] == 2


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
    before = signal.getsignal(signal.SIGINT)  # a job in the background may ignore it
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
