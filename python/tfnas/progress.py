"""What a running search or training tells: callbacks, a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from tfnas.callbacks import Callback, Record


@dataclass(frozen=True)
class Wording:
    """How records are put into lines: by `SEARCHING` those of a search, by `train.TRAINING` those of a training."""

    task: str
    start: Callable[[Record], list[str]]
    epoch: Callable[[Record], str]
    end: Callable[[Record], list[str]]
    figures: Callable[[Record], str]

    def step(self, record: Record) -> str:
        return f"{epoch_of(record)} step {record['step']}  {self.figures(record)}"


class PlainProgress(Callback):
    """One line per record: for logs, pipes and batch jobs."""

    def __init__(self, file: TextIO | None = None, wording: Wording | None = None) -> None:
        self._file = file
        self._wording = wording or SEARCHING

    def _print(self, text: str) -> None:
        print(text, file=self._file or sys.stdout, flush=True)

    def on_start(self, record: Record) -> None:
        for line in self._wording.start(record):
            self._print(line)

    def on_step(self, record: Record) -> None:
        self._print(self._wording.step(record))

    def on_epoch(self, record: Record) -> None:
        self._print(self._wording.epoch(record))

    def on_end(self, record: Record) -> None:
        for line in self._wording.end(record):
            self._print(line)

    def on_message(self, text: str) -> None:
        self._print(text)


class LiveProgress(Callback):
    """A bar with the current figures below the finished epochs' lines."""

    def __init__(self, console: Console | None = None, wording: Wording | None = None) -> None:
        self._console = console or Console()
        self._wording = wording or SEARCHING
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None

    def on_start(self, record: Record) -> None:
        for line in self._wording.start(record):
            self._console.print(line, highlight=False, markup=False)
        total = record["epochs"] * record["steps_per_epoch"]
        self._task = self._progress.add_task(self._wording.task, total=total, completed=record["step"], figures="")
        self._progress.start()

    def on_step(self, record: Record) -> None:
        if self._task is not None:
            self._progress.update(
                self._task,
                completed=record["step"],
                description=epoch_of(record),
                figures=self._wording.figures(record),
            )

    def on_epoch(self, record: Record) -> None:
        self._console.print(self._wording.epoch(record), highlight=False, markup=False)
        if self._task is not None:
            self._progress.update(self._task, completed=record["step"])

    def on_end(self, record: Record) -> None:
        self.close()
        for line in self._wording.end(record):
            self._console.print(line, highlight=False, markup=False)

    def on_message(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._progress.stop()


def default_progress(wording: Wording | None = None) -> Callback:
    """`LiveProgress` where standard output is a terminal, `PlainProgress` elsewhere."""
    return (
        LiveProgress(wording=wording)
        if sys.stdout is not None and sys.stdout.isatty()
        else PlainProgress(wording=wording)
    )


def start_lines(record: Record) -> list[str]:
    """What a person should know before the first step."""
    low, high = record["reachable_range_ms"]
    chosen = "the middle of the range" if record["target_is_midpoint"] else "given"
    several = record.get("all_targets_ms")
    return [
        f"run {record['output']}",
        f"space {record['space']}, data {record['data']}: {record['train_images']} training and "
        f"{record['held_out_images']} held-out images, {record['num_classes']} classes",
        f"engine {record['engine']} in {record['precision']} on {record['device']}, {record['threads']} CPU threads, "
        f"seed {record['seed']}",
        f"reachable latency {low:.4g} to {high:.4g} ms by the table",
        f"warm-up for the targets {', '.join(f'{target:g}' for target in several)} ms"
        if several
        else f"target {record['target_latency_ms']:.4f} ms ({chosen})",
        f"{record['epochs']} epochs ({record['warmup_epochs']} warm-up) of {record['steps_per_epoch']} steps"
        + (f", going on at step {record['step']}" if record["step"] else ""),
    ]


def epoch_line(record: Record) -> str:
    """One epoch in one line, latencies against the target."""
    held_out = record["held_out_accuracy"]
    parts = [
        f"{epoch_of(record)} done",
        f"loss {record['loss']:.3f}",
        f"accuracy {100 * record['accuracy']:.1f} %",
        f"held-out {100 * held_out:.1f} %" if held_out is not None else "",
        f"latency expected {record['expected_latency_ms']:.4g}, derived {record['derived_latency_ms']:.4g}, "
        f"target {record['target_latency_ms']:.4g} ms",
        f"tau {record['tau']:.2f}",
        f"{record['images_per_s']:.0f} images/s",
        f"{duration(record['time_left_s'])} left",
    ]
    return "  ".join(part for part in parts if part)


def end_lines(record: Record) -> list[str]:
    """The result in words."""
    measured = record["measured_latency_ms"]
    lines = [
        f"derived network: {record['lut_latency_ms']:.4f} ms by the table, target {record['target_latency_ms']:.4f} ms"
        + (
            f", measured {measured:.4f} ms"
            if measured is not None
            else f", not measured: {record['not_measured_because']}"
        ),
        f"{record['multiply_adds'] / 1e6:.2f} M multiply-adds, {record['parameters'] / 1e6:.3f} M parameters",
    ]
    if record["repaired"]:
        lines.append(
            "repaired: the strongest network could not meet the target at any width; "
            "the most probable one that can was taken"
        )
    return [*lines, f"written to {record['architecture_file']} after {duration(record['seconds'])}"]


def duration(seconds: float) -> str:
    """`75.2` -> `1:15`; hours are added where there are any."""
    whole = int(seconds)
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def epoch_of(record: Record) -> str:
    """`epoch 3/90`, counted from 1."""
    return f"epoch {record['epoch'] + 1}/{record['epochs']}"


def _figures(record: Record) -> str:
    return (
        f"loss {record['loss']:.3f}  accuracy {100 * record['accuracy']:.1f} %  "
        f"latency {record['expected_latency_ms']:.4g}/{record['derived_latency_ms']:.4g} "
        f"of {record['target_latency_ms']:.4g} ms  "
        f"{record['images_per_s']:.0f} images/s  {duration(record['time_left_s'])} left"
    )


SEARCHING = Wording("searching", start_lines, epoch_line, end_lines, _figures)
