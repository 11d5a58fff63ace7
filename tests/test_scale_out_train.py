"""A training in several processes: equal everywhere, as one process would compute it, resumed to the same bits."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from process_cases import raise_failures, run_processes
from search_cases import assert_equal_bits
from test_train import results_of
from tfnas.callbacks import Callback
from tfnas.checkpoint import load_checkpoint
from tfnas.data import build_data
from tfnas.interrupt import TrainingInterrupted
from tfnas.pipeline import data_options
from tfnas.processes import Processes
from tfnas.run import read_metrics
from tfnas.space_io import load_space
from tfnas.train import train
from tfnas.train_config import TrainConfig
from tfnas.train_loop import Batch, TrainLoop, _noise_seed, update_average_
from torch import Tensor
from train_cases import train_config, train_values

WORLD = 2
# Gradients are halved before they are added up, here afterwards; over six steps.
RTOL = 1e-5


def _train_spied(config: TrainConfig) -> dict[str, Any]:
    """Figures of every step, and what was compared at each epoch's end."""
    seen: dict[str, Any] = {"figures": [], "values": []}
    account, require_equal = TrainLoop._account, Processes.require_equal

    def spying_account(self: TrainLoop, step: int, kind: str, figures: list[float]) -> None:
        seen["figures"].append(figures)
        account(self, step, kind, figures)

    def spying_equal(self: Processes, values: Any, when: str) -> None:
        values = {name: [v.clone() if isinstance(v, Tensor) else v for v in parts] for name, parts in values.items()}
        seen["values"].append(values)
        require_equal(self, values, when)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainLoop, "_account", spying_account)
        patch.setattr(Processes, "require_equal", spying_equal)
        result = train(config, [])
    assert result.best_accuracy is not None
    return seen | {"network": result.network.state_dict(), "best": result.best_accuracy}


class _BothShares(TrainLoop):
    """One process that runs every process's share of a step itself, then averages gradients and statistics."""

    def share_data(self) -> None:
        space = load_space(Path(self.config.architecture).with_name("tiny.yaml"))
        options = data_options(self.config, space, self.device)
        self.shares = [
            build_data(options, self.config.seed, rank=rank, world_size=WORLD).train.stream() for rank in range(WORLD)
        ]

    def _optimize(self, batches: list[Batch]) -> None:
        config, net = self.config, self.network
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        start = {name: value.clone() for name, value in net.named_buffers()}
        grads, statistics, sums = [], [], torch.zeros(3, dtype=torch.float64)
        for rank, share in enumerate(self.shares):
            for name, value in net.named_buffers():
                value.copy_(start[name])
            torch.manual_seed(_noise_seed(config.seed, self.step, rank))
            passes = list(itertools.islice(share, config.accumulation_steps))
            images = sum(len(labels) for _, labels in passes)
            for x, y in passes:
                logits = net(x)
                loss = F.cross_entropy(logits, y, label_smoothing=config.regularization.label_smoothing)
                (loss * len(y) / images).backward()
                sums += torch.tensor([float(loss.detach()) * len(y), float((logits.argmax(1) == y).sum()), len(y)])
            grads.append([p.grad for p in self.parameters])
            statistics.append([value.clone() for value in net.buffers()])
            self.optimizer.zero_grad(set_to_none=True)
        for parameter, *parts in zip(self.parameters, *grads, strict=True):
            parameter.grad = torch.stack(parts).mean(0)
        for value, *parts in zip(net.buffers(), *statistics, strict=True):
            value.copy_(torch.stack(parts).double().mean(0))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.optimizer.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert self.average is not None
        assert config.ema_decay is not None
        update_average_(self.average, net, config.ema_decay)
        self._keep("step", torch.cat([sums, norm.double()[None]]))


def _train_both_shares(config: TrainConfig) -> dict[str, Any]:
    def make(*arguments: Any) -> _BothShares:
        loop = _BothShares(*arguments)
        loop.share_data()
        return loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tfnas.train.TrainLoop", make)
        return _train_spied(config)


def test_processes_are_equal_and_follow_one_that_runs_all_shares(tmp_path: Path) -> None:
    config = train_config(tmp_path, log__every_steps=1, steps_per_epoch=3, epochs=2)
    shared = raise_failures(run_processes(WORLD, _train_spied, config))
    assert len(shared[0]["values"]) == 1 + 2
    for other in shared[1:]:
        assert_equal_bits(shared[0]["values"], other["values"])
        assert_equal_bits(shared[0]["network"], other["network"])
        assert (other["figures"], other["best"]) == (shared[0]["figures"], shared[0]["best"])

    config.output = str(tmp_path / "alone")
    alone = _train_both_shares(config)
    worst = 0.0
    for ours, theirs in zip(shared[0]["figures"], alone["figures"], strict=True):
        assert ours == pytest.approx(theirs, rel=RTOL)
        worst = max(worst, abs(ours[0] - theirs[0]) / theirs[0])
    print("seed", config.seed, "largest relative difference of a loss", worst)
    assert len(alone["figures"]) == 6
    for name, value in shared[0]["network"].items():
        torch.testing.assert_close(value, alone["network"][name], rtol=1e-4, atol=1e-5)
    assert shared[0]["best"] == alone["best"]


class _Listener(Callback):
    """Remembers remarks."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def on_message(self, text: str) -> None:
        self.said.append(text)


def _train(config: TrainConfig) -> list[str]:
    listener = _Listener()
    train(config, [listener])
    return listener.said


def _train_stopped(config: TrainConfig, step: int, rank: int = 1) -> None:
    original = TrainLoop._optimize

    def stopping(self: TrainLoop, batches: list[Batch]) -> None:
        if self.step == step and self.processes.rank == rank:
            os.kill(os.getpid(), 15)
        original(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainLoop, "_optimize", stopping)
        train(config, [])


@pytest.mark.parametrize("world", [WORLD, pytest.param(3, marks=pytest.mark.slow)])
def test_resumes_to_the_same_bits(tmp_path: Path, world: int) -> None:
    changes: dict[str, Any] = {"epochs": 2, "steps_per_epoch": 3, "dataset__fake_images_per_class": 25}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    raise_failures(run_processes(world, _train, train_config(tmp_path / "whole", **changes)))
    config = train_config(tmp_path / "parts", **changes)
    for stopped in run_processes(world, _train_stopped, config, 2):
        assert isinstance(stopped, TrainingInterrupted)
        assert "stopped at step 4 of 6" in str(stopped)
    config.resume = True
    raise_failures(run_processes(world, _train, config))
    assert_equal_bits(results_of(tmp_path / "whole" / "run"), results_of(tmp_path / "parts" / "run"))


@pytest.mark.parametrize(("before", "after"), [(WORLD, 1), (1, WORLD)])
def test_another_number_of_processes_says_what_changes(tmp_path: Path, before: int, after: int) -> None:
    """With accumulation, moving average and bfloat16: 44 images are 6 steps of 8, or 3 of 16."""
    config = train_config(tmp_path, epochs=2, precision="bfloat16", batch_size=4)
    steps = {1: 6, WORLD: 3}
    for stopped in run_processes(before, _train_stopped, config, steps[before], before - 1):
        assert isinstance(stopped, TrainingInterrupted)
    at = load_checkpoint(config.output or "")[0]["step"]
    assert steps[before] < at < 2 * steps[before]
    config.resume = True
    said, *_ = raise_failures(run_processes(after, _train, config))
    warning = next(text for text in said if text.startswith("warning"))
    for part in (
        f"{before} process(es) before",
        f"now {after}",
        f"{steps[before]} steps an epoch become {steps[after]}",
        f"step {at} counts as {at * steps[after] // steps[before]}",
    ):
        assert part in warning
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "epoch"] == [steps[before], 2 * steps[after]]
    assert records[-1]["kind"] == "end"
    assert math.isfinite(records[-1]["test"]["loss"])


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    values = train_values(tmp_path, epochs=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tfnas"]
    options = ["--architecture", values["architecture"], "--output", values["output"], "--data", "fake"]
    options += ["--epochs", "1", "--batch_size", "8", "--dataset.fake_images_per_class", "14"]
    done = subprocess.run(
        [*command, "train", *options], capture_output=True, text=True, check=False, timeout=200, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (records[0]["processes"], records[0]["images_per_step"]) == (2, 16)
    assert records[-1]["kind"] == "end"
