"""The epochs of one training: steps, moving average, validation, best and last weights, checkpoints."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tfnas.architecture import architecture_to_dict
from tfnas.checkpoint import CheckpointError, save_checkpoint
from tfnas.data import DataBundle
from tfnas.evaluate import evaluate_network, logits_of
from tfnas.interrupt import StopRequest, TrainingInterrupted
from tfnas.network import Network
from tfnas.pace import Pace
from tfnas.progress import Callback, Record
from tfnas.run import MetricsFile
from tfnas.schedule import averaging_decay, warmup_cosine
from tfnas.train_config import TrainConfig
from tfnas.weights import save_weights

BEST_FILE = "best.safetensors"
LAST_FILE = "last.safetensors"
Batch = tuple[Tensor, Tensor]


class TrainingFailed(RuntimeError):
    """The training cannot go on: the loss is not finite, or memory ran out. The last good checkpoint is kept."""


@dataclass
class EpochSums:
    """Sums over the steps of the current epoch."""

    images: int = 0
    loss: float = 0.0
    correct: int = 0


class TrainLoop:
    """Runs the epochs of one training.

    With the same configuration, data and number of threads it gives the same bits on a CPU, whether or not it was
    interrupted: data order, augmentation and dropout are functions of the seed and the step.
    """

    def __init__(
        self,
        config: TrainConfig,
        network: Network,
        data: DataBundle,
        folder: Path,
        metrics: MetricsFile,
        callbacks: Sequence[Callback],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """`state` is a checkpoint to go on from; `network` is then overwritten by it."""
        self.config, self.network, self.folder = config, network, folder
        self.metrics, self.callbacks = metrics, callbacks
        self.data = data.train if config.validation == "held_out" else data.full_train
        self.validation = {"held_out": data.held_out, "test": data.test, "none": None}[config.validation]
        passes = len(self.data)
        self.steps_per_epoch = config.steps_per_epoch or -(-passes // config.accumulation_steps)
        self.step = 0
        self.sums = EpochSums()
        self.best_epoch, self.best_accuracy = -1, None if self.validation is None else -1.0
        optimizer = config.optimizer
        self.parameters = list(network.parameters())
        self.optimizer = torch.optim.SGD(
            self.parameters,
            lr=optimizer.lr,
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
            nesterov=optimizer.nesterov,
        )
        self.average: AveragedModel | None = None
        if config.ema_decay is not None:
            self.average = AveragedModel(network, multi_avg_fn=_growing_average(config.ema_decay), use_buffers=True)
        if state is not None:
            self._restore(state)
        self._unread: list[tuple[int, int, Tensor]] = []
        self._pace = Pace(0, self.total_steps)
        self._saved_at = time.monotonic()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def result(self) -> Network:
        """The network to validate and save: the moving average where there is one."""
        return self.network if self.average is None else cast(Network, self.average.module)

    def run(self) -> None:
        """Train to the end. Raises `TrainingInterrupted` (after a checkpoint) and `TrainingFailed`."""
        device = self.parameters[0].device
        with StopRequest() as stop, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            try:
                while self.step < self.total_steps:
                    epoch = self.step // self.steps_per_epoch
                    self._train(epoch, stop)
                    self._finish(epoch)
                    self._checkpoint()
                    if stop.signal_number is not None and self.step < self.total_steps:
                        self._interrupted(stop.signal_number)
            except torch.OutOfMemoryError as error:
                raise TrainingFailed(
                    f"out of memory at step {self.step} with batch_size {self.config.batch_size}: {error}. Lower "
                    "batch_size and raise accumulation_steps by the same factor; the last checkpoint is kept"
                ) from error

    def _train(self, epoch: int, stop: StopRequest) -> None:
        """The steps of `epoch`, from the current one on."""
        first = self.step % self.steps_per_epoch
        if first == 0:
            self.sums = EpochSums()
        self.network.train()
        batches = self._batches(epoch, first)
        self._pace.start(self.step)
        for position in range(first, self.steps_per_epoch):
            self._optimize(next(batches))
            self.step += 1
            if self.step % self.config.log.every_steps == 0:
                self._log_step(epoch)
            if position + 1 < self.steps_per_epoch:
                if stop.signal_number is not None:
                    self._checkpoint()
                    self._interrupted(stop.signal_number)
                if self._checkpoint_due():
                    self._checkpoint()
        self._read_back()

    def _batches(self, epoch: int, first: int) -> Iterator[list[Batch]]:
        """The batches of each step; with `steps_per_epoch` the images go on where the epoch before stopped."""
        each = self.config.accumulation_steps
        if self.config.steps_per_epoch is None:
            passes = self.data.epoch(epoch, first * each)
        else:
            passes = self.data.stream((epoch * self.steps_per_epoch + first) * each)
        while step := list(itertools.islice(passes, each)):
            yield step

    def _optimize(self, batches: list[Batch]) -> None:
        """One SGD step on the mean loss over all images of `batches`."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        torch.manual_seed(_noise_seed(config.seed, self.step))
        images_in_step = sum(len(labels) for _, labels in batches)
        figures = []
        for images, labels in batches:
            logits = logits_of(self.network, images, config.precision)
            loss = F.cross_entropy(logits, labels, label_smoothing=config.regularization.label_smoothing)
            (loss * (len(labels) / images_in_step)).backward()
            correct = (logits.detach().argmax(1) == labels).sum()
            figures.append(torch.stack([loss.detach().double() * len(labels), correct.double()]))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.optimizer.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.network)
        self._unread.append((self.step, images_in_step, torch.cat([torch.stack(figures).sum(0), norm.double()[None]])))
        self._pace.count(images_in_step)

    def _learning_rate(self) -> float:
        optimizer = self.config.optimizer
        warmup_steps = round(optimizer.warmup_epochs * self.steps_per_epoch)
        return warmup_cosine(self.step, self.total_steps, warmup_steps, optimizer.lr, optimizer.final_lr)

    def _read_back(self) -> None:
        """Bring the figures since the last call to the host; raises `TrainingFailed` at the first not finite."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        rows = torch.stack([figures for _, _, figures in unread]).tolist()
        for (step, images, _), (loss, correct, norm) in zip(unread, rows, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingFailed(
                    f"step {step} is not finite: loss {loss / images}, gradient norm {norm}. The last good checkpoint "
                    f"stays in {self.folder}; a lower optimizer.lr or a warm-up may help"
                )
            self.sums.images += images
            self.sums.loss += loss
            self.sums.correct += int(correct)

    def _finish(self, epoch: int) -> None:
        """What follows an epoch's steps: validation, the epoch's record, best and last weights."""
        config = self.config
        last = epoch + 1 == config.epochs
        record = self._record("epoch", epoch)
        measured = None
        if self.validation is not None and (last or (epoch + 1) % config.log.validate_every_epochs == 0):
            measured = evaluate_network(self.result, self.validation.epoch(0), config.precision)
        best = self.validation is None
        if measured is not None and self.best_accuracy is not None and measured.top1 > self.best_accuracy:
            best, self.best_accuracy = True, measured.top1
        if best:
            self.best_epoch = epoch
        record |= {
            "validation": asdict(measured) if measured is not None else None,
            "best_epoch": self.best_epoch,
            "best_accuracy": self.best_accuracy,
        }
        weights, facts = self.result.state_dict(), {"epoch": str(epoch), "selected_by": config.validation}
        if best:
            save_weights(self.folder / BEST_FILE, weights, facts)
        save_weights(self.folder / LAST_FILE, weights, facts)
        self.metrics.append(record)
        for callback in self.callbacks:
            callback.on_epoch(record)

    def _log_step(self, epoch: int) -> None:
        self._read_back()
        record = self._record("step", epoch)
        self.metrics.append(record)
        for callback in self.callbacks:
            callback.on_step(record)

    def _record(self, kind: str, epoch: int) -> Record:
        """What steps and epochs tell alike; loss and accuracy are those of the epoch so far, on training images."""
        return {
            "kind": kind,
            "epoch": epoch,
            "epochs": self.config.epochs,
            "step": self.step,
            "loss": self.sums.loss / self.sums.images,
            "accuracy": self.sums.correct / self.sums.images,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": self._pace.images_per_s(),
            "time_left_s": self._pace.time_left_s(self.step),
        }

    def _checkpoint_due(self) -> bool:
        every = self.config.checkpoint
        if every.every_steps is not None and self.step % every.every_steps == 0:
            return True
        return every.every_s is not None and time.monotonic() - self._saved_at >= every.every_s

    def _checkpoint(self) -> None:
        """Write all that the rest of the training depends on, after making sure that it is finite."""
        self._read_back()
        state = {
            "architecture": architecture_to_dict(self.network.architecture),
            "threads": torch.get_num_threads(),
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "sums": asdict(self.sums),
            "best_epoch": self.best_epoch,
            "best_accuracy": self.best_accuracy,
            "network": self.network.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "metrics_bytes": self.metrics.flush(),
        }
        save_checkpoint(self.folder, state)
        self._saved_at = time.monotonic()

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint."""
        here = {
            "architecture": architecture_to_dict(self.network.architecture),
            "steps_per_epoch": self.steps_per_epoch,
        }
        for key, value in here.items():
            if key not in state or state[key] != value:
                raise CheckpointError(f"the checkpoint in {self.folder} belongs to another training: its {key} differs")
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.sums = EpochSums(**state["sums"])
        self.best_epoch, self.best_accuracy = state["best_epoch"], state["best_accuracy"]

    def _interrupted(self, signal_number: int) -> NoReturn:
        raise TrainingInterrupted(
            signal_number,
            f"stopped at step {self.step} of {self.total_steps}; go on with --resume --output {self.folder}",
        )


def _growing_average(decay: float) -> Callable[..., None]:
    def average_(averaged: Sequence[Tensor], current: Sequence[Tensor], updates: Tensor | int) -> None:
        get_ema_multi_avg_fn(averaging_decay(decay, int(updates)))(averaged, current, updates)

    return average_


def _noise_seed(seed: int, step: int) -> int:
    """Seed of a step's dropout and drop-connect: 63 bits, without a relation between neighbouring steps or seeds."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest(), "little") >> 1
