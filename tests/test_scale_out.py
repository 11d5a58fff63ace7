"""A search in several processes: equal everywhere, as one process would compute it, stopped and resumed together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from process_cases import raise_failures, run_processes
from search_cases import assert_equal_bits, results_of, tiny_config, tiny_file
from tfnas import Callback, search, search_steps
from tfnas.bilevel import BilevelSearch, SearchFailed
from tfnas.callbacks import Record
from tfnas.checkpoint import load_checkpoint
from tfnas.config import SearchConfig
from tfnas.data import build_data
from tfnas.interrupt import ProcessFailed, SearchInterrupted
from tfnas.pipeline import data_options
from tfnas.processes import Processes
from tfnas.run import read_metrics
from tfnas.schedule import temperature
from tfnas.space_io import load_space
from tfnas.steps import WeightStep, weight_step
from tfnas.supernet import Supernet
from torch import Tensor

from tfnas_ext.sampling import gumbel_softmax_weights

WORLD = 2
# Sums of float32 gradients in another order, over the twelve steps of a search with a tenfold learning rate.
RTOL = 1e-5


def _changes(engine: str = "reference") -> dict[str, Any]:
    return {"log__every_steps": 1, "weights__lr": 0.2, "architecture__lr": 0.1, "engine": engine}


def _search_spied(config: SearchConfig) -> dict[str, Any]:
    """Losses of every step, what was compared at each epoch's end, and how many all-reduces there were."""
    seen: dict[str, Any] = {"losses": [], "values": [], "reduced": 0}
    require_equal, reduce_ = Processes.require_equal, Processes.reduce_

    def spying_step(*arguments: Any, **options: Any) -> WeightStep:
        done = weight_step(*arguments, **options)
        seen["losses"].append(done.losses.tolist())
        return done

    def spying_equal(self: Processes, values: Any, when: str) -> None:
        values = {name: [v.clone() if isinstance(v, Tensor) else v for v in parts] for name, parts in values.items()}
        seen["values"].append((when, values))
        require_equal(self, values, when)

    def spying_reduce(self: Processes, *arguments: Any) -> None:
        seen["reduced"] += 1
        reduce_(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_steps, "weight_step", spying_step)
        patch.setattr(Processes, "require_equal", spying_equal)
        patch.setattr(Processes, "reduce_", spying_reduce)
        result = search(config, [])
    return seen | {"architecture": result.architecture, "log_alpha": result.supernet.log_alpha.detach()}


class _BothShards(BilevelSearch):
    """One process that runs every process's share of a step one after the other and averages the gradients itself."""

    losses: list[list[float]]

    def share_data(self, config: SearchConfig) -> None:
        device = torch.device("cpu")
        options = data_options(config, self.space, device)
        bundles = [build_data(options, config.seed, rank=rank, world_size=WORLD) for rank in range(WORLD)]
        self.shares = [(bundle.train, bundle.held_out.for_batch_norm()) for bundle in bundles]
        self.losses = []

    def _begin(self, epoch: int, first: int) -> None:
        super()._begin(epoch, first)
        self._train_shares = [train.stream(self.step) for train, _ in self.shares]
        self._held_out_shares = [held_out.stream(self.architecture_steps) for _, held_out in self.shares]

    def _weight_step(self, images: Tensor, labels: Tensor) -> None:
        batches = [next(share) for share in self._train_shares]

        def both(supernet: Supernet, _images: Tensor, _labels: Tensor, choices: Tensor, **options: Any) -> WeightStep:
            dense = supernet.dense_parameters()
            grads, buffers, losses = [], [], []
            assert not torch.equal(batches[0][0], batches[1][0])
            for x, y in batches:
                losses.append(torch.stack([F.cross_entropy(path, y) for path in supernet.forward_paths(x, choices)]))
                grads.append(torch.autograd.grad(losses[-1].sum(), dense))
                buffers.append([buffer.clone() for buffer in supernet.engine.gradient_buffers()])
            for buffer, parts in zip(supernet.engine.gradient_buffers(), zip(*buffers, strict=True), strict=True):
                buffer.copy_(torch.stack(parts).mean(0))
            mean_grads = [torch.stack(parts).mean(0) for parts in zip(*grads, strict=True)]
            rows = [(p.detach(), g, m) for p, g, m in zip(dense, mean_grads, supernet.dense_momenta(), strict=True)]
            options.pop("processes")
            norm = supernet.engine.clip_and_sgd_(**options, dense=rows)
            mean = torch.stack(losses).mean(0).detach()
            self.losses.append(mean.tolist())
            return WeightStep(mean, torch.zeros(len(choices)), torch.tensor(len(batches[0][1])), norm)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search_steps, "weight_step", both)
            super()._weight_step(images, labels)

    def _architecture_step(self, images: Tensor, labels: Tensor) -> None:
        net, parameters = self.supernet, self.supernet.architecture_parameters()
        tau = temperature(self.config, self.step // self.steps_per_epoch)
        grads = []
        for x, y in (next(share) for share in self._held_out_shares):
            u = gumbel_softmax_weights(net.log_alpha, tau, self.config.seed, self.step, net.alpha_mask)
            v = net.depth_weights()
            loss = F.cross_entropy(net.forward_mixture(x, u, v), y) + self.steps._latency_term(u, v)
            grads.append(torch.autograd.grad(loss, parameters))
        means = [torch.stack(parts).mean(0) for parts in zip(*grads, strict=True)]
        self.steps.adam.step_(means, self.config.architecture.max_norm)
        self.architecture_steps += 1


def _search_both_shards(config: SearchConfig) -> dict[str, Any]:
    made: list[_BothShards] = []

    def make(*arguments: Any) -> _BothShards:
        loop = _BothShards(*arguments)
        loop.share_data(config)
        made.append(loop)
        return loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tfnas.pipeline.BilevelSearch", make)
        result = search(config, [])
    return {"losses": made[0].losses, "architecture": result.architecture, "log_alpha": result.supernet.log_alpha}


@pytest.mark.parametrize(
    ("engine", "precision"),
    [("reference", "float32"), ("native", "float32"), pytest.param("native", "bfloat16", marks=pytest.mark.slow)],
)
def test_processes_are_equal_and_follow_one_that_runs_all_shards(tmp_path: Path, engine: str, precision: str) -> None:
    changes = _changes(engine) | {"precision": precision}
    config = tiny_config(tmp_path, **changes, steps_per_epoch=4)
    try:
        Supernet(load_space(config.space), engine=engine)
    except RuntimeError as error:
        pytest.skip(str(error))
    shared = raise_failures(run_processes(WORLD, _search_spied, config))
    names = [when for when, _ in shared[0]["values"]]
    assert names == ["before the first step", "after epoch 1", "after epoch 2", "after epoch 3"]
    for other in shared[1:]:
        assert_equal_bits(shared[0]["values"], other["values"])
        assert other["architecture"] == shared[0]["architecture"]
        assert other["losses"] == shared[0]["losses"]
    # one a step (12 of the weights, 2 of the architecture in each of two epochs), one for each measurement of accuracy
    assert shared[0]["reduced"] == 12 + 2 * 2 + (3 + 1)

    config.output = str(tmp_path / "alone")
    alone = _search_both_shards(config)
    worst = 0.0
    for ours, theirs in zip(shared[0]["losses"], alone["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=RTOL)
        worst = max(worst, *(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)))
    print("seed", config.seed, "largest relative difference of a loss", worst)
    assert len(alone["losses"]) == 12
    assert alone["architecture"] == shared[0]["architecture"]
    torch.testing.assert_close(alone["log_alpha"], shared[0]["log_alpha"], rtol=RTOL, atol=RTOL)


def _search_signalled(config: SearchConfig, step: int) -> None:
    """The second process, and it alone, gets SIGTERM in a step."""
    original = BilevelSearch._take_step

    def signalled(self: BilevelSearch, position: int) -> None:
        if self.step == step and self.processes.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, position)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BilevelSearch, "_take_step", signalled)
        search(config, [])


def _search(config: SearchConfig) -> Any:
    said: list[str] = []

    class Listener(Callback):
        def on_message(self, text: str) -> None:
            said.append(text)

        def on_start(self, record: Record) -> None:
            said.append(f"step {record['step']}, {record['processes']} processes")

    result = search(config, [Listener()])
    return said, result.architecture


@pytest.mark.parametrize("world", [WORLD, pytest.param(3, marks=pytest.mark.slow)])
def test_all_stop_at_one_step_and_resume_to_the_same_bits(tmp_path: Path, world: int) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    changes = _changes() | {"epochs": 2}
    raise_failures(run_processes(world, _search, tiny_config(tmp_path / "whole", **changes)))
    expected = results_of(tmp_path / "whole" / "run")
    config = tiny_config(tmp_path / "parts", **changes)
    # the step after the one with the signal is the last: in an epoch; with three processes at its end
    step = 4 if world == WORLD else 2
    for stopped in run_processes(world, _search_signalled, config, step):
        assert isinstance(stopped, SearchInterrupted)
        assert f"stopped at step {step + 2} of 8" in str(stopped)
    assert load_checkpoint(config.output)[0]["step"] == step + 2
    config.resume = True
    said = raise_failures(run_processes(world, _search, config))
    assert said[0][0][0] == f"step {step + 2}, {world} processes"
    assert said[1][0] == []
    results = results_of(tmp_path / "parts" / "run")
    for found in (results, expected):
        found["metrics"][0].pop("space")
    assert_equal_bits(results, expected)


def test_another_number_of_processes_says_what_changes(tmp_path: Path) -> None:
    changes = _changes() | {"steps_per_epoch": None, "dataset__fake_images_per_class": 5, "epochs": 2}
    config = tiny_config(tmp_path, **changes)
    for stopped in run_processes(WORLD, _search_signalled, config, 3):
        assert "stopped at step 5 of 6" in str(stopped)  # 40 images are steps of 16, 16 and 8
    config.resume = True
    (said, _), *_ = raise_failures(run_processes(1, _search, config))
    warning = next(text for text in said if text.startswith("warning"))
    for part in ("2 process(es) before", "now 1", "16 images a step become 8", "3 steps an epoch become 5"):
        assert part in warning
    assert "step 5 counts as 8" in warning
    assert "step 8, 1 processes" in said
    assert read_metrics(Path(config.output) / "metrics.jsonl")[-1]["kind"] == "end"


def _search_diverging(config: SearchConfig) -> None:
    original = BilevelSearch._take_step

    def diverging(self: BilevelSearch, position: int) -> None:
        original(self, position)
        if self.step == 5 and self.processes.rank == 1:
            self.supernet.log_alpha.data[0, 1] += 1e-6

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BilevelSearch, "_take_step", diverging)
        search(config, [])


def test_processes_that_diverge_are_stopped_and_named(tmp_path: Path) -> None:
    for result in run_processes(WORLD, _search_diverging, tiny_config(tmp_path, **_changes())):
        assert isinstance(result, SearchFailed)
        assert "after epoch 2" in str(result)
        assert "log_alpha of process 1" in str(result)
    assert load_checkpoint(tmp_path / "run")[0]["step"] == 4


def test_an_error_of_the_first_ends_all(tmp_path: Path) -> None:
    first, second = run_processes(WORLD, _search, tiny_config(tmp_path, target_latency_ms=1e6, lut="nowhere.json"))
    assert isinstance(first, OSError | ValueError)
    assert isinstance(second, ProcessFailed)


def test_torchrun(tmp_path: Path) -> None:
    """The command as documented; two processes share the 160 training images."""
    file = tiny_file(tmp_path, epochs=1, warmup_epochs=0, steps_per_epoch=None, batch_size=11)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tfnas", "search", "--config", str(file)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    start, *_, end = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # seven steps of 22 and one of 6
    assert (start["processes"], start["images_per_step"], start["steps_per_epoch"]) == (2, 22, 8)
    assert end["kind"] == "end"
