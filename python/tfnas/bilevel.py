"""The bi-level search (paper, section 3.3): weight steps, architecture steps, elasticity scaling after each epoch.

One `BilevelSearch` is one run from its first or its resumed step to its last. It writes metrics and checkpoints; with
the same configuration, table, data and number of threads it gives the same numbers on a CPU, whether or not it was
interrupted in between: sampling noise, data order and augmentation are functions of the seed and the step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfnas.architecture import Architecture
from tfnas.callbacks import Record, Reporter
from tfnas.checkpoint import find_not_finite
from tfnas.config import SearchConfig
from tfnas.data import DataBundle
from tfnas.derive import derive, kept_layers
from tfnas.interrupt import RunFailed, SearchInterrupted
from tfnas.latency.lut import LatencyTable
from tfnas.latency.objective import LayerLatencies, expected_latency_ms, layer_latencies_ms
from tfnas.loop import RunLoop
from tfnas.processes import ALONE, Processes
from tfnas.scaling import fit_widths
from tfnas.schedule import is_warmup, learning_rate, temperature
from tfnas.search_steps import SearchSteps
from tfnas.space_io import space_to_dict
from tfnas.steps import evaluation_step
from tfnas.supernet import Supernet
from tfnas.target import Target
from tfnas_ext.sampling import sample_paths

# Noise of held-out measurements must not be that of the training steps with the same number.
_EVALUATION_STREAM = 0x2545F4914F6CDD1D


class SearchFailed(RunFailed):
    """The search cannot go on; the last good checkpoint is kept."""


@dataclass
class EpochSums:
    """Sums over the weight steps of the current epoch."""

    images: int = 0
    steps: int = 0
    loss: float = 0.0
    second_loss: float = 0.0
    correct: int = 0


class BilevelSearch(RunLoop):
    """Runs the epochs of one search."""

    noun = "search"
    failed = SearchFailed
    interrupted = SearchInterrupted
    memory_advice = "Lower batch_size"

    def __init__(
        self,
        config: SearchConfig,
        supernet: Supernet,
        data: DataBundle,
        table: LatencyTable,
        target: Target,
        folder: Path,
        reporter: Reporter,
        state: Mapping[str, Any] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """`state` is a checkpoint to go on from (`load_checkpoint`); the supernet is then overwritten by it."""
        super().__init__(
            epochs=config.epochs,
            steps_per_epoch=config.steps_per_epoch or len(data.train),
            warmup_epochs=config.warmup_epochs,
            batch_size=config.batch_size,
            images_per_step=config.batch_size * processes.world_size,
            checkpoint=config.checkpoint,
            log_every_steps=config.log.every_steps,
            device=supernet.log_alpha.device,
            folder=folder,
            reporter=reporter,
            processes=processes,
        )
        self.config, self.supernet = config, supernet
        self.train_data, self.held_out_data = data.train, data.held_out.for_batch_norm()
        self.table, self.target = table, target
        self._images = data.identity()
        self.space = supernet.space
        self.architecture_steps = 0
        self.sums = EpochSums()
        self.steps = SearchSteps(supernet, config, self._latencies(), target.target_latency_ms, processes)
        self.derived_latency_ms = self._derived_latency_ms()
        if state is not None:
            self._restore(state)
            self.steps.set_latencies(self._latencies())

    def _begin(self, epoch: int, first: int) -> None:
        config = self.config
        if first == 0:
            self.sums = EpochSums()
            if config.weights.restart_each_epoch:
                self.supernet.reset_momentum_()
            if config.architecture.restart_each_epoch:
                self.steps.adam.reset_()
        self._warmup = is_warmup(config, epoch)
        second = "none" if self._warmup else config.sampling.second_path
        self.steps.begin(self.step, learning_rate(config, epoch), temperature(config, epoch), second)
        self._training = self.train_data.stream(self.step)
        self._held_out = self.held_out_data.stream(self.architecture_steps)

    def _take_step(self, position: int) -> None:
        self._weight_step(*next(self._training))
        if not self._warmup and (position + 1) % self.config.architecture.every_steps == 0:
            self._architecture_step(*next(self._held_out))

    def _weight_step(self, images: Tensor, labels: Tensor) -> None:
        self._keep("weight", self.steps.weight(images, labels))
        self._pace.count(len(labels) * self.processes.world_size)

    def _architecture_step(self, images: Tensor, labels: Tensor) -> None:
        self._keep("architecture", self.steps.architecture(images, labels))
        self.architecture_steps += 1

    def _account(self, step: int, kind: str, figures: list[float]) -> None:
        of_weights = kind == "weight"
        correct, norm, *losses = figures[1:] if of_weights else figures
        if not all(map(math.isfinite, figures)):
            raise SearchFailed(
                f"{kind} step {step} is not finite: loss {losses[0]}, gradient norm {norm}. The last good "
                f"checkpoint stays in {self.folder}; a lower {'weights' if of_weights else 'architecture'}.lr may help"
            )
        if of_weights:
            self.sums.images += int(figures[0])
            self.sums.steps += 1
            self.sums.loss += losses[0]
            self.sums.second_loss += sum(losses[1:])
            self.sums.correct += int(correct)

    def _finish(self, epoch: int) -> None:
        """What follows an epoch's steps: elasticity scaling, held-out accuracy, the epoch's record."""
        config, sums = self.config, self.sums
        record = self._record("epoch", epoch) | self._sums_record()
        record |= {
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
        self.reporter.record(record)

    def _scale(self) -> Record:
        """Elasticity scaling (Algorithm 1) of the derived seed network, written back into the supernet."""
        net = self.supernet
        result = fit_widths(self._derive(), self.table, self.target.target_latency_ms)
        net.apply_scaling(result.architecture, kept_layers(self.space, net.log_alpha, net.log_beta))
        self.steps.set_latencies(self._latencies())
        return {"gammas": list(result.gammas), "binding": result.binding}

    def _derive(self) -> Architecture:
        net = self.supernet
        if (name := find_not_finite({"log_alpha": net.log_alpha, "log_beta": net.log_beta})) is not None:
            raise self.failed(self._not_finite(name))
        return derive(self.space, net.log_alpha, net.log_beta, net.widths)

    def _derived_latency_ms(self) -> float:
        return self.table.architecture_ms(self._derive())

    def _latencies(self) -> LayerLatencies:
        """Latencies of all candidates at their widths; these change only between epochs."""
        net = self.supernet
        return layer_latencies_ms(self.space, self.table, net.widths).to(net.log_alpha)

    @torch.no_grad()
    def _expected_latency_ms(self) -> Tensor:
        net = self.supernet
        u, v = net.log_alpha.softmax(1), net.depth_weights()
        return expected_latency_ms(self.space, self.steps.latencies, u, v)

    def expected_latency_ms(self) -> float:
        """Expected latency in ms of the mixture by the probabilities alone, without noise."""
        return float(self._expected_latency_ms())

    def held_out_accuracy(self) -> float:
        """Share of held-out images that sampled (Gumbel) paths of the supernet classify right."""
        net, seed = self.supernet, self.config.seed ^ _EVALUATION_STREAM
        right, seen = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        batches = self.held_out_data.epoch(0)
        for index, (images, labels) in enumerate(itertools.islice(batches, self.config.log.held_out_batches)):
            # The temperature does not matter for which path is drawn.
            number = self.step * len(self.held_out_data) + index
            choices = sample_paths(net.log_alpha, 1.0, seed, number, "none", net.alpha_mask)
            right += evaluation_step(net, images, labels, choices).sum()
            seen += len(labels)
        self.processes.reduce_([], [right, seen])
        return float(right) / float(seen)

    def _step_record(self, epoch: int) -> Record:
        return self._record("step", epoch) | {"derived_latency_ms": self.derived_latency_ms}

    def _step_figures(self) -> Tensor:
        return self._expected_latency_ms().double()[None]

    def _measured_record(self, figures: list[float]) -> Record:
        return self._sums_record() | {"expected_latency_ms": figures[0]}

    def _record(self, kind: str, epoch: int) -> Record:
        """What steps and epochs tell alike."""
        return {
            "kind": kind,
            "epoch": epoch,
            "epochs": self.config.epochs,
            "step": self.step,
            "target_latency_ms": self.target.target_latency_ms,
            "images_per_s": self._pace.images_per_s(),
            "time_left_s": self._pace.time_left_s(self.step),
        }

    def _sums_record(self) -> Record:
        """Loss and accuracy of the epoch's Gumbel paths so far."""
        sums = self.sums
        return {"loss": sums.loss / sums.steps, "accuracy": sums.correct / sums.images}

    def _identity(self) -> dict[str, Any]:
        return {
            "space": space_to_dict(self.space),
            "target_latency_ms": self.target.target_latency_ms,
            **self._images,
        }

    def _state(self) -> dict[str, Any]:
        return {
            "architecture_steps": self.architecture_steps,
            "sums": asdict(self.sums),
            "derived_latency_ms": self.derived_latency_ms,
            "supernet": self.supernet.checkpoint_state(),
            "adam": self.steps.adam.state_dict(),
        }

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self.supernet.load_checkpoint_state(state["supernet"])
        self.steps.adam.load_state_dict(state["adam"])
        self.architecture_steps = state["architecture_steps"]
        self.sums = EpochSums(**state["sums"])
        self.derived_latency_ms = state["derived_latency_ms"]

    def _values(self) -> dict[str, Iterable[Tensor | str]]:
        net = self.supernet
        return {
            "weights": net.state_dict().values(),
            "momentum": net.optimizer_state().values(),
            "log_alpha": [net.log_alpha],
            "log_beta": [net.log_beta],
            "Adam's moments": self.steps.adam.state(),
            "widths": [str(net.widths)],
            "step": [str((self.step, self.architecture_steps))],
        }


def _finite_rows(values: Tensor) -> list[list[float | None]]:
    """Rows for JSON, with None for the masked -inf."""
    return [[x if math.isfinite(x) else None for x in row] for row in values.detach().tolist()]
