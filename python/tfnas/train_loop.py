"""The epochs of one training: steps, moving average, validation, best and last weights, checkpoints."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tfnas.architecture import architecture_to_dict
from tfnas.callbacks import Record, Reporter
from tfnas.data import DataBundle
from tfnas.evaluate import evaluate_network, logits_of
from tfnas.interrupt import RunFailed, TrainingInterrupted
from tfnas.loop import RunLoop
from tfnas.network import Network
from tfnas.parallel import exchange_gradients, share_network
from tfnas.processes import ALONE, Processes
from tfnas.schedule import averaging_decay, warmup_cosine
from tfnas.train_config import TrainConfig
from tfnas.trained import images_facts
from tfnas.weights import save_weights

BEST_FILE = "best.safetensors"
LAST_FILE = "last.safetensors"
Batch = tuple[Tensor, Tensor]


class TrainingFailed(RunFailed):
    """The training cannot go on; the last good checkpoint is kept."""


@dataclass
class EpochSums:
    """Sums over the steps of the current epoch."""

    images: int = 0
    loss: float = 0.0
    correct: int = 0


class TrainLoop(RunLoop):
    """Runs the epochs of one training.

    With the same configuration, data and number of threads it gives the same bits on a CPU, whether or not it was
    interrupted: data order, augmentation and dropout are functions of the seed and the step.
    """

    noun = "training"
    failed = TrainingFailed
    interrupted = TrainingInterrupted
    memory_advice = "Lower batch_size and raise accumulation_steps by the same factor"

    def __init__(
        self,
        config: TrainConfig,
        network: Network,
        data: DataBundle,
        folder: Path,
        reporter: Reporter,
        state: Mapping[str, Any] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """`state` is a checkpoint to go on from; `network` is then overwritten by it."""
        self.config, self.network = config, network
        self.data = data.train if config.validation == "held_out" else data.full_train
        self.validation = {"held_out": data.held_out, "test": data.test, "none": None}[config.validation]
        self.parameters = list(network.parameters())
        self._trained_on, self._images = images_facts(data), data.identity()
        super().__init__(
            epochs=config.epochs,
            steps_per_epoch=config.steps_per_epoch or -(-len(self.data) // config.accumulation_steps),
            warmup_epochs=0,
            batch_size=config.batch_size,
            images_per_step=config.batch_size * config.accumulation_steps * processes.world_size,
            checkpoint=config.checkpoint,
            log_every_steps=config.log.every_steps,
            device=self.parameters[0].device,
            folder=folder,
            reporter=reporter,
            processes=processes,
        )
        self.sums = EpochSums()
        self.best_epoch, self.best_accuracy = -1, None if self.validation is None else -1.0
        optimizer = config.optimizer
        self.optimizer = torch.optim.SGD(
            self.parameters,
            lr=optimizer.lr,
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
            nesterov=optimizer.nesterov,
        )
        self.average: AveragedModel | None = None
        if config.ema_decay is not None:
            self.average = AveragedModel(network, use_buffers=True)
        if state is not None:
            self._restore(state)
        self._parallel = share_network(network, processes)

    @property
    def result(self) -> Network:
        """The network to validate and save: the moving average where there is one."""
        return self.network if self.average is None else cast(Network, self.average.module)

    def run(self, end_epoch: int | None = None) -> None:
        """Train to the end. Raises `TrainingInterrupted` (after a checkpoint) and `TrainingFailed`."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            super().run(end_epoch)

    def _begin(self, epoch: int, first: int) -> None:
        if first == 0:
            self.sums = EpochSums()
        self.network.train()
        self._epoch_batches = self._batches(epoch, first)

    def _take_step(self, position: int) -> None:
        self._optimize(next(self._epoch_batches))

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
        torch.manual_seed(_noise_seed(config.seed, self.step, self.processes.rank))
        images_in_step = sum(len(labels) for _, labels in batches)
        figures = []
        for index, (images, labels) in enumerate(batches):
            with exchange_gradients(self._parallel, index + 1 == len(batches)):
                logits = logits_of(self._parallel, images, config.precision)
                loss = F.cross_entropy(logits, labels, label_smoothing=config.regularization.label_smoothing)
                (loss * (len(labels) / images_in_step)).backward()
            correct = (logits.detach().argmax(1) == labels).sum()
            figures.append(torch.stack([loss.detach().double() * len(labels), correct.double()]))
        sums = torch.cat([torch.stack(figures).sum(0), torch.full_like(figures[0][:1], images_in_step)])
        # Batch norm is each process's own; averaging what it remembers lets it see all images.
        self.processes.reduce_([b for b in self.network.buffers() if b.is_floating_point()], [sums])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.optimizer.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None and config.ema_decay is not None:
            update_average_(self.average, self.network, config.ema_decay)
        self._keep("step", torch.cat([sums, norm.double()[None]]))
        self._pace.count(images_in_step * self.processes.world_size)

    def _learning_rate(self) -> float:
        optimizer = self.config.optimizer
        warmup_steps = round(optimizer.warmup_epochs * self.steps_per_epoch)
        return warmup_cosine(self.step, self.total_steps, warmup_steps, optimizer.lr, optimizer.final_lr)

    def _account(self, step: int, kind: str, figures: list[float]) -> None:
        loss, correct, images, norm = figures
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingFailed(
                f"step {step} is not finite: loss {loss / images}, gradient norm {norm}. The last good checkpoint "
                f"stays in {self.folder}; a lower optimizer.lr or a warm-up may help"
            )
        self.sums.images += int(images)
        self.sums.loss += loss
        self.sums.correct += int(correct)

    def _finish(self, epoch: int) -> None:
        """What follows an epoch's steps: validation, the epoch's record, best and last weights."""
        config = self.config
        last = epoch + 1 == config.epochs
        record = self._record("epoch", epoch) | self._measured_record([])
        measured = None
        if self.validation is not None and (last or (epoch + 1) % config.log.validate_every_epochs == 0):
            measured = evaluate_network(self.result, self.validation.epoch(0), config.precision, self.processes)
            if not math.isfinite(measured.loss):
                raise TrainingFailed(
                    f"the validation loss after epoch {epoch + 1} (step {self.step}) is {measured.loss}. The last good "
                    f"checkpoint stays in {self.folder}; a lower optimizer.lr may help"
                )
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
        facts |= self._trained_on
        if self.processes.is_first:
            if best:
                save_weights(self.folder / BEST_FILE, weights, facts)
            save_weights(self.folder / LAST_FILE, weights, facts)
        self.reporter.record(record)

    def _step_record(self, epoch: int) -> Record:
        return self._record("step", epoch)

    def _record(self, kind: str, epoch: int) -> Record:
        """What steps and epochs tell alike."""
        return {
            "kind": kind,
            "epoch": epoch,
            "epochs": self.config.epochs,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": self._pace.images_per_s(),
            "time_left_s": self._pace.time_left_s(self.step),
        }

    def _measured_record(self, figures: list[float]) -> Record:
        """Loss and accuracy of the epoch so far, on training images."""
        return {"loss": self.sums.loss / self.sums.images, "accuracy": self.sums.correct / self.sums.images}

    def _identity(self) -> dict[str, Any]:
        return {"architecture": architecture_to_dict(self.network.architecture), **self._images}

    def _state(self) -> dict[str, Any]:
        return {
            "sums": asdict(self.sums),
            "best_epoch": self.best_epoch,
            "best_accuracy": self.best_accuracy,
            "network": self.network.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
        }

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sums = EpochSums(**state["sums"])
        self.best_epoch, self.best_accuracy = state["best_epoch"], state["best_accuracy"]

    def _values(self) -> dict[str, Iterable[Tensor | str]]:
        momentum = (state.get("momentum_buffer") for state in self.optimizer.state.values())
        return {
            "weights and statistics": self.network.state_dict().values(),
            "moving average": self.average.state_dict().values() if self.average is not None else [],
            "momentum": [buffer for buffer in momentum if buffer is not None],
            "step": [str(self.step)],
        }


@torch.no_grad()
def update_average_(average: AveragedModel, network: nn.Module, decay: float) -> None:
    """Take the weights and statistics of `network` into `average`, a moving average whose decay grows to `decay`.

    Nothing is read back from a GPU; `AveragedModel.update_parameters` waits there, since it hands over the number of
    updates on the device.
    """
    updates = int(average.n_averaged)  # always on the host
    averaged = [*average.module.parameters(), *average.module.buffers()]
    current = [*network.parameters(), *network.buffers()]
    for floating in (True, False):
        pairs = [pair for pair in zip(averaged, current, strict=True) if pair[0].is_floating_point() == floating]
        mine, new = [pair[0].detach() for pair in pairs], [pair[1].detach() for pair in pairs]
        if updates == 0:
            for a, b in zip(mine, new, strict=True):
                a.copy_(b)
        elif pairs:
            get_ema_multi_avg_fn(averaging_decay(decay, updates))(mine, new, updates)
    average.n_averaged += 1


def _noise_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a step's dropout and drop-connect: 63 bits, without a relation between neighbouring steps or seeds."""
    words = f"{seed} {step} {rank}" if rank else f"{seed} {step}"
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") >> 1
