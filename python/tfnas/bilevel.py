"""The bi-level search (paper, section 3.3): weight steps, architecture steps, elasticity scaling after each epoch.

One `BilevelSearch` is one run from its first or its resumed step to its last. It writes metrics and checkpoints; with
the same configuration, table, data and number of threads it gives the same numbers on a CPU, whether or not it was
interrupted in between: sampling noise, data order and augmentation are functions of the seed and the step.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from tfnas.architecture import Architecture
from tfnas.checkpoint import CheckpointError, save_checkpoint
from tfnas.config import SearchConfig
from tfnas.data import DataBundle
from tfnas.derive import derive, kept_layers
from tfnas.interrupt import SearchInterrupted, StopRequest
from tfnas.latency.lut import LatencyTable
from tfnas.latency.objective import expected_latency_ms, latency_objective, layer_latencies_ms
from tfnas.pace import Pace
from tfnas.progress import Callback, Record
from tfnas.run import MetricsFile
from tfnas.scaling import fit_widths
from tfnas.schedule import is_warmup, learning_rate, temperature
from tfnas.space_io import space_to_dict
from tfnas.steps import architecture_step, evaluation_step, weight_step
from tfnas.supernet import Supernet
from tfnas.target import Target
from tfnas_ext.sampling import gumbel_softmax_weights, sample_paths

# Noise of held-out measurements must not be that of the training steps with the same number.
_EVALUATION_STREAM = 0x2545F4914F6CDD1D


class SearchFailed(RuntimeError):
    """The search cannot go on: the loss is not finite, or memory ran out. The last good checkpoint is kept."""


@dataclass
class EpochSums:
    """Sums over the weight steps of the current epoch."""

    images: int = 0
    steps: int = 0
    loss: float = 0.0
    second_loss: float = 0.0
    correct: int = 0


class BilevelSearch:
    """Runs the epochs of one search."""

    def __init__(
        self,
        config: SearchConfig,
        supernet: Supernet,
        data: DataBundle,
        table: LatencyTable,
        target: Target,
        folder: Path,
        metrics: MetricsFile,
        callbacks: Sequence[Callback],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """`state` is a checkpoint to go on from (`load_checkpoint`); the supernet is then overwritten by it."""
        self.config, self.supernet, self.data = config, supernet, data
        self.table, self.target, self.folder = table, target, folder
        self.metrics, self.callbacks = metrics, callbacks
        self.space = supernet.space
        self.steps_per_epoch = config.steps_per_epoch or len(data.train)
        self.step = 0
        self.architecture_steps = 0
        self.sums = EpochSums()
        self.adam = self._new_adam()
        self.derived_latency_ms = self._derived_latency_ms()
        if state is not None:
            self._restore(state)
        self._refresh_latencies()
        self._unread: list[tuple[int, int, Tensor]] = []
        self._pace = Pace(config.warmup_epochs * self.steps_per_epoch, self.total_steps)
        self._saved_at = time.monotonic()

    @property
    def total_steps(self) -> int:
        """Weight steps of the whole search."""
        return self.config.epochs * self.steps_per_epoch

    def run(self) -> None:
        """Search to the end. Raises `SearchInterrupted` (after a checkpoint) and `SearchFailed`."""
        with StopRequest() as stop:
            try:
                while self.step < self.total_steps:
                    epoch = self.step // self.steps_per_epoch
                    self._train(epoch, stop)
                    self._finish(epoch)
                    self._checkpoint()
                    if stop.signal_number is not None:
                        self._interrupted(stop.signal_number)
            except torch.OutOfMemoryError as error:
                raise SearchFailed(self._memory_message(error)) from error

    def _train(self, epoch: int, stop: StopRequest) -> None:
        """The weight and architecture steps of `epoch`, from the current step on."""
        config, first = self.config, self.step % self.steps_per_epoch
        if first == 0:
            self.sums = EpochSums()
            if config.weights.restart_each_epoch:
                self.supernet.reset_momentum_()
            if config.architecture.restart_each_epoch:
                self.adam = self._new_adam()
        warmup, tau, lr = is_warmup(config, epoch), temperature(config, epoch), learning_rate(config, epoch)
        second = "none" if warmup else config.sampling.second_path
        training = self.data.train.stream(self.step)
        held_out = self.data.held_out.stream(self.architecture_steps)
        self._pace.start(self.step)
        for position in range(first, self.steps_per_epoch):
            self._weight_step(*next(training), tau, lr, second)
            if not warmup and (position + 1) % config.architecture.every_steps == 0:
                self._architecture_step(held_out, tau)
            self.step += 1
            if self.step % config.log.every_steps == 0:
                self._log_step(epoch)
            if position + 1 < self.steps_per_epoch:
                if stop.signal_number is not None:
                    self._checkpoint()
                    self._interrupted(stop.signal_number)
                if self._checkpoint_due():
                    self._checkpoint()
        self._read_back()

    def _weight_step(self, images: Tensor, labels: Tensor, tau: float, lr: float, second: str) -> None:
        net, weights = self.supernet, self.config.weights
        choices = sample_paths(net.log_alpha, tau, self.config.seed, self.step, second, net.alpha_mask)
        done = weight_step(
            net,
            images,
            labels,
            choices,
            lr=lr,
            momentum=weights.momentum,
            weight_decay=weights.weight_decay,
            max_norm=weights.max_norm,
        )
        self._keep(done.losses, done.norm, done.correct[0], len(labels))
        self._pace.count(len(labels))

    def _architecture_step(self, held_out: Iterator[tuple[Tensor, Tensor]], tau: float) -> None:
        net = self.supernet
        images, labels = next(held_out)
        done = architecture_step(
            net,
            self.adam,
            images,
            labels,
            gumbel_softmax_weights(net.log_alpha, tau, self.config.seed, self.step, net.alpha_mask),
            self._latency_term,
            max_norm=self.config.architecture.max_norm,
        )
        self.architecture_steps += 1
        self._keep((done.cross_entropy + done.latency_term)[None], done.norm, done.correct, 0)

    def _latency_term(self, u: Tensor, v: Tensor) -> Tensor:
        """lambda * C(LAT) of the mixture, 0-d."""
        objective = self.config.objective
        latency_ms = expected_latency_ms(self.space, self._latencies_ms, u, v)
        return latency_objective(
            objective.name,
            latency_ms,
            self.target.target_latency_ms,
            weight=objective.latency_weight,
            exponent=objective.exponent,
        )

    def _keep(self, losses: Tensor, norm: Tensor, correct: Tensor, images: int) -> None:
        """Remember a step's figures on the device; `images` is 0 for an architecture step."""
        figures = torch.cat([losses.detach().double(), norm.double()[None], correct.double()[None]])
        self._unread.append((self.step, images, figures))

    def _read_back(self) -> None:
        """Bring the figures since the last call to the host; raises `SearchFailed` at the first that is not finite."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        values = torch.cat([figures for _, _, figures in unread]).tolist()
        for step, images, figures in unread:
            row, values = values[: len(figures)], values[len(figures) :]
            *losses, norm, correct = row
            if not all(map(math.isfinite, row)):
                kind = "weight" if images else "architecture"
                raise SearchFailed(
                    f"{kind} step {step} is not finite: loss {losses[0]}, gradient norm {norm}. The last good "
                    f"checkpoint stays in {self.folder}; a lower {'weights' if images else 'architecture'}.lr may help"
                )
            if images:
                self.sums.images += images
                self.sums.steps += 1
                self.sums.loss += losses[0]
                self.sums.second_loss += sum(losses[1:])
                self.sums.correct += int(correct)

    def _finish(self, epoch: int) -> None:
        """What follows an epoch's steps: elasticity scaling, held-out accuracy, the epoch's record."""
        config, sums = self.config, self.sums
        record = self._record("epoch", epoch) | {
            "tau": temperature(config, epoch),
            "lr": learning_rate(config, epoch),
            "second_loss": sums.second_loss / sums.steps if sums.second_loss else None,
        }
        if config.elasticity_scaling and not is_warmup(config, epoch):
            record["scaling"] = self._scale()
        self.derived_latency_ms = self._derived_latency_ms()
        every = config.log.held_out_every_epochs
        measured = every and ((epoch + 1) % every == 0 or epoch + 1 == config.epochs)
        network = self._derive()
        record |= {
            "expected_latency_ms": self.expected_latency_ms(),
            "derived_latency_ms": self.derived_latency_ms,
            "held_out_accuracy": self.held_out_accuracy() if measured else None,
            "log_alpha": _finite_rows(self.supernet.log_alpha),
            "log_beta": _finite_rows(self.supernet.log_beta),
            "derived": [[op.candidate for op in ops] for ops in network.stages],
            "widths": self.supernet.widths,
        }
        self.metrics.append(record)
        for callback in self.callbacks:
            callback.on_epoch(record)

    def _scale(self) -> Record:
        """Elasticity scaling (Algorithm 1) of the derived seed network, written back into the supernet."""
        net = self.supernet
        result = fit_widths(self._derive(), self.table, self.target.target_latency_ms)
        net.apply_scaling(result.architecture, kept_layers(self.space, net.log_alpha, net.log_beta))
        self._refresh_latencies()
        return {"gammas": list(result.gammas), "binding": result.binding}

    def _derive(self) -> Architecture:
        net = self.supernet
        return derive(self.space, net.log_alpha, net.log_beta, net.widths)

    def _derived_latency_ms(self) -> float:
        return self.table.architecture_ms(self._derive())

    def _refresh_latencies(self) -> None:
        """Latencies of all candidates at their widths; these change only between epochs."""
        net = self.supernet
        self._latencies_ms = layer_latencies_ms(self.space, self.table, net.widths).to(net.log_alpha)

    @torch.no_grad()
    def expected_latency_ms(self) -> float:
        """Expected latency in ms of the mixture by the probabilities alone, without noise."""
        net = self.supernet
        u, v = net.log_alpha.softmax(1), net.depth_weights()
        return float(expected_latency_ms(self.space, self._latencies_ms, u, v))

    def held_out_accuracy(self) -> float:
        """Share of held-out images that sampled (Gumbel) paths of the supernet classify right."""
        net, seed = self.supernet, self.config.seed ^ _EVALUATION_STREAM
        right: list[Tensor] = []
        images_seen = 0
        batches = self.data.held_out.epoch(0)
        for index, (images, labels) in enumerate(itertools.islice(batches, self.config.log.held_out_batches)):
            # The temperature does not matter for which path is drawn.
            number = self.step * len(self.data.held_out) + index
            choices = sample_paths(net.log_alpha, 1.0, seed, number, "none", net.alpha_mask)
            right.append(evaluation_step(net, images, labels, choices))
            images_seen += len(labels)
        return float(torch.cat(right).sum()) / images_seen

    def _log_step(self, epoch: int) -> None:
        self._read_back()
        record = self._record("step", epoch) | {
            "expected_latency_ms": self.expected_latency_ms(),
            "derived_latency_ms": self.derived_latency_ms,
        }
        self.metrics.append(record)
        for callback in self.callbacks:
            callback.on_step(record)

    def _record(self, kind: str, epoch: int) -> Record:
        """What steps and epochs tell alike; loss and accuracy are the epoch's so far, of the Gumbel path."""
        sums = self.sums
        return {
            "kind": kind,
            "epoch": epoch,
            "epochs": self.config.epochs,
            "step": self.step,
            "loss": sums.loss / sums.steps,
            "accuracy": sums.correct / sums.images,
            "target_latency_ms": self.target.target_latency_ms,
            "images_per_s": self._pace.images_per_s(),
            "time_left_s": self._pace.time_left_s(self.step),
        }

    def _checkpoint_due(self) -> bool:
        every = self.config.checkpoint
        if every.every_steps is not None and self.step % every.every_steps == 0:
            return True
        return every.every_s is not None and time.monotonic() - self._saved_at >= every.every_s

    def _checkpoint(self) -> None:
        """Write all that the rest of the search depends on, after making sure that it is finite."""
        self._read_back()
        state = {
            "space": space_to_dict(self.space),
            "target_latency_ms": self.target.target_latency_ms,
            "threads": torch.get_num_threads(),
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "architecture_steps": self.architecture_steps,
            "sums": asdict(self.sums),
            "derived_latency_ms": self.derived_latency_ms,
            "supernet": self.supernet.checkpoint_state(),
            "adam": self.adam.state_dict(),
            "metrics_bytes": self.metrics.flush(),
        }
        save_checkpoint(self.folder, state)
        self._saved_at = time.monotonic()

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint."""
        here = {
            "space": space_to_dict(self.space),
            "target_latency_ms": self.target.target_latency_ms,
            "steps_per_epoch": self.steps_per_epoch,
        }
        for key, value in here.items():
            if state[key] != value:
                raise CheckpointError(
                    f"the checkpoint in {self.folder} belongs to another search: its {key} is {state[key]}, here "
                    f"{value}"
                )
        self.supernet.load_checkpoint_state(state["supernet"])
        self.adam.load_state_dict(state["adam"])
        self.step, self.architecture_steps = state["step"], state["architecture_steps"]
        self.sums = EpochSums(**state["sums"])
        self.derived_latency_ms = state["derived_latency_ms"]

    def _new_adam(self) -> torch.optim.Adam:
        adam = self.config.architecture
        parameters = self.supernet.architecture_parameters()
        return torch.optim.Adam(parameters, lr=adam.lr, betas=adam.betas, weight_decay=adam.weight_decay)

    def _interrupted(self, signal_number: int) -> NoReturn:
        raise SearchInterrupted(
            signal_number,
            f"stopped at step {self.step} of {self.total_steps}; go on with --resume --output {self.folder}",
        )

    def _memory_message(self, error: torch.OutOfMemoryError) -> str:
        device = self.supernet.log_alpha.device
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else math.nan
        return (
            f"out of memory at step {self.step} with batch_size {self.config.batch_size} (peak {peak:.2f} GiB): {error}"
            ". Lower batch_size; the last checkpoint is kept"
        )


def _finite_rows(values: Tensor) -> list[list[float | None]]:
    """Rows for JSON, with None for the masked -inf."""
    return [[x if math.isfinite(x) else None for x in row] for row in values.detach().tolist()]
