"""What searches and trainings have in common: epochs of steps, log lines, checkpoints, orderly stops, resuming."""

from __future__ import annotations

import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from tfnas.callbacks import Record, Reporter
from tfnas.checkpoint import CheckpointError, find_not_finite, save_checkpoint
from tfnas.config import CheckpointConfig
from tfnas.fields import describe
from tfnas.figures import Figures
from tfnas.interrupt import RunFailed, RunInterrupted, StopRequest
from tfnas.pace import Pace
from tfnas.processes import Processes, ProcessesDiverged
from tfnas.shortage import is_out_of_memory, is_write_failure, peak_memory_bytes


class RunLoop(ABC):
    """The epochs of one run, from its first or its resumed step to its last.

    A subclass does the steps and says what its state is. Steps leave their figures on the device (`_keep`); every
    `log_every_steps` steps they are sent to the host, which waits for them at the end of an epoch only: on a GPU a log
    line may be written when the next one is due. With several processes all call `run`; the first one writes.
    """

    noun: ClassVar[str]  # "search"
    failed: ClassVar[type[RunFailed]]
    interrupted: ClassVar[type[RunInterrupted]]
    memory_advice: ClassVar[str]

    def __init__(
        self,
        *,
        epochs: int,
        steps_per_epoch: int,
        warmup_epochs: int,
        batch_size: int,
        images_per_step: int,
        checkpoint: CheckpointConfig,
        log_every_steps: int,
        device: torch.device,
        folder: Path,
        reporter: Reporter,
        processes: Processes,
    ) -> None:
        self.epochs, self.steps_per_epoch, self.images_per_step = epochs, steps_per_epoch, images_per_step
        self.folder, self.reporter, self.processes, self.device = folder, reporter, processes, device
        self.step = 0
        self._batch_size = batch_size
        self._checkpoint_config, self._log_every_steps = checkpoint, log_every_steps
        self._figures: Figures[tuple[int, str] | Record] = Figures()
        self._pace = Pace(warmup_epochs * steps_per_epoch, self.total_steps)
        self._saved_at = time.monotonic()

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def run(self, end_epoch: int | None = None) -> None:
        """Go on to the end, or to the end of `end_epoch` epochs.

        Raises `interrupted` (after a checkpoint) on SIGINT or SIGTERM to any of the processes, and `failed`.
        """
        last_step = self.total_steps if end_epoch is None else end_epoch * self.steps_per_epoch
        with StopRequest() as stop:
            try:
                self._require_equal("before the first step")
                while self.step < last_step:
                    epoch = self.step // self.steps_per_epoch
                    self._train(epoch, stop)
                    self._finish(epoch)
                    self._require_equal(f"after epoch {epoch + 1}")
                    self._checkpoint()
                    if self._must_stop(stop):
                        self._interrupt(stop)
            except ProcessesDiverged as error:
                raise self.failed(str(error)) from error
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                raise self.failed(self._memory_message(error)) from error
            except OSError as error:
                if not is_write_failure(error):
                    raise
                raise self.failed(
                    f"step {self.step}: a file of the run cannot be written ({error}); the last checkpoint in "
                    f"{self.folder} is kept. Make room, then go on with --resume --output {self.folder}"
                ) from error

    def _train(self, epoch: int, stop: StopRequest) -> None:
        """The steps of `epoch`, from the current one on."""
        first = self.step % self.steps_per_epoch
        self._begin(epoch, first)
        self._pace.start(self.step)
        for position in range(first, self.steps_per_epoch):
            self.processes.wants_stop = stop.signal_number is not None
            self._take_step(position)
            self.step += 1
            logs = self.step % self._log_every_steps == 0
            if logs:
                self._figures.add(self._step_record(epoch), self._step_figures())
                self._read_back(wait=False)
            if position + 1 < self.steps_per_epoch:
                # Asking a GPU whether another process wants to stop waits for it, as reading figures back does.
                if (logs or self.processes.world_size == 1 or self.device.type == "cpu") and self._must_stop(stop):
                    self._checkpoint()
                    self._interrupt(stop)
                if self._checkpoint_due():
                    self._checkpoint()
        self._read_back()

    @abstractmethod
    def _begin(self, epoch: int, first: int) -> None:
        """Get ready for the steps of `epoch` from its `first` on (0: the epoch is new)."""

    @abstractmethod
    def _take_step(self, position: int) -> None:
        """Step `self.step`, which is `position` in its epoch."""

    @abstractmethod
    def _finish(self, epoch: int) -> None:
        """What follows an epoch's steps."""

    @abstractmethod
    def _step_record(self, epoch: int) -> Record:
        """What the host knows now for a log line."""

    def _step_figures(self) -> Tensor:
        """What the device knows now for a log line, float64 [n]."""
        return torch.empty(0, dtype=torch.float64, device=self.device)

    @abstractmethod
    def _measured_record(self, figures: list[float]) -> Record:
        """The rest of a log line, once all steps up to it are accounted for and its `_step_figures` are there."""

    @abstractmethod
    def _account(self, step: int, kind: str, figures: list[float]) -> None:
        """Add up what `_keep` kept; raises `failed` where it is not finite."""

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with this run to be its own."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """All that the rest of the run depends on, besides step and identity."""

    @abstractmethod
    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `_state` gave."""

    @abstractmethod
    def _values(self) -> dict[str, Iterable[Tensor | str]]:
        """What must be the same in every process, by name."""

    def _keep(self, kind: str, figures: Tensor) -> None:
        """Remember a step's figures, float64 [n], on the device."""
        self._figures.add((self.step, kind), figures)

    def _read_back(self, wait: bool = True) -> None:
        """Account for the steps so far, or without `wait` for those whose figures are there, and write log lines.

        Raises `failed` at the first step that is not finite.
        """
        self._figures.send()
        for tag, figures in self._figures.take(wait):
            if isinstance(tag, tuple):
                self._account(*tag, figures)
            else:
                record = tag | self._measured_record(figures)
                # steps check their loss before their update; this is the first sight of what the update did
                for name, value in record.items():
                    if isinstance(value, float) and not math.isfinite(value):
                        raise self.failed(self._not_finite(name))
                self.reporter.record(record)

    def _not_finite(self, name: str) -> str:
        return (
            f"{name} is not finite after step {self.step - 1}. The last good checkpoint stays in {self.folder}; a "
            "lower learning rate may help"
        )

    def _checkpoint_due(self) -> bool:
        every = self._checkpoint_config
        if every.every_steps is not None and self.step % every.every_steps == 0:
            return True
        return every.every_s is not None and time.monotonic() - self._saved_at >= every.every_s

    def _checkpoint(self) -> None:
        """Write all that the rest of the run depends on, after making sure that it is finite."""
        if not self.processes.is_first:
            return
        self._read_back()
        state = {
            **self._identity(),
            **self._state(),
            "threads": torch.get_num_threads(),
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "images_per_step": self.images_per_step,
            "world_size": self.processes.world_size,
            "metrics_bytes": self.reporter.flush(),
        }
        # figures are from before the last update
        if (name := find_not_finite(state)) is not None:
            raise self.failed(self._not_finite(name))
        save_checkpoint(self.folder, state)
        self._saved_at = time.monotonic()

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint; says what changes where another number of processes wrote it."""
        here = self._identity()
        if state.get("world_size", 1) == self.processes.world_size:
            here["steps_per_epoch"] = self.steps_per_epoch
        for key, value in here.items():
            if key in state and state[key] != value:
                raise CheckpointError(
                    f"the checkpoint in {self.folder} belongs to another {self.noun}: its {key} is "
                    f"{describe(state[key])}, here {describe(value)}"
                )
        try:
            self._load_state(state)
            self.step = int(state["step"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"the checkpoint in {self.folder} does not fit this {self.noun}: {type(error).__name__}: {error}"
            ) from error
        if state.get("world_size", 1) != self.processes.world_size:
            self._change_processes(state)

    def _change_processes(self, state: Mapping[str, Any]) -> None:
        """Go on at the same share of the epoch with another number of images a step."""
        epoch, position = divmod(state["step"], state["steps_per_epoch"])
        self.step = epoch * self.steps_per_epoch + position * self.steps_per_epoch // state["steps_per_epoch"]
        self.reporter.say(
            f"warning: {state['world_size']} process(es) before the interruption, now {self.processes.world_size}: "
            f"{state['images_per_step']} images a step become {self.images_per_step}, {state['steps_per_epoch']} "
            f"steps an epoch become {self.steps_per_epoch}, step {state['step']} counts as {self.step}; learning "
            "rates stay. The result is not that of an uninterrupted run"
        )

    def _require_equal(self, when: str) -> None:
        if self.processes.world_size > 1:
            self.processes.require_equal(self._values(), when)

    def _must_stop(self, stop: StopRequest) -> bool:
        self.processes.wants_stop = stop.signal_number is not None
        return self.processes.stop_agreed()

    def _interrupt(self, stop: StopRequest) -> NoReturn:
        self.processes.from_first(lambda: None)  # whoever ends first ends the others: not before the checkpoint
        raise self.interrupted(
            stop.signal_number or signal.SIGTERM,
            f"stopped at step {self.step} of {self.total_steps}; go on with --resume --output {self.folder}",
        )

    def _memory_message(self, error: Exception) -> str:
        return (
            f"out of memory at step {self.step} with batch_size {self._batch_size} (peak "
            f"{peak_memory_bytes(self.device) / 2**30:.2f} GiB): {error}. The last checkpoint is kept: where "
            f"others took it, go on with --resume --output {self.folder}. {self.memory_advice} in a new run"
        )
