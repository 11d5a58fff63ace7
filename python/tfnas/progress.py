"""What a running search tells: callbacks, a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

Record = dict[str, Any]


class Callback:
    """Receives a search's records; override what you need.

    Records are plain dicts, the same as the lines of `metrics.jsonl`: `on_start` gets the run's facts (`kind`
    "start"), `on_step` one record every `log.every_steps` weight steps ("step"), `on_epoch` one per epoch ("epoch"),
    `on_end` the result ("end"), `on_message` a sentence for people. A tracker is a few lines:

        class Tracker(Callback):
            def on_epoch(self, record):
                wandb.log(record)
    """

    def on_start(self, record: Record) -> None:
        """The search begins or goes on: target, reachable range, steps, backend."""

    def on_step(self, record: Record) -> None:
        """Some weight steps are done."""

    def on_epoch(self, record: Record) -> None:
        """An epoch is done."""

    def on_end(self, record: Record) -> None:
        """The derived network is written."""

    def on_message(self, text: str) -> None:
        """A remark or a warning."""

    def close(self) -> None:
        """The search has ended, by whatever cause."""


class PlainProgress(Callback):
    """One line per record: for logs, pipes and batch jobs."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file

    def _print(self, text: str) -> None:
        print(text, file=self._file or sys.stdout, flush=True)

    def on_start(self, record: Record) -> None:
        for line in start_lines(record):
            self._print(line)

    def on_step(self, record: Record) -> None:
        self._print(step_line(record))

    def on_epoch(self, record: Record) -> None:
        self._print(epoch_line(record))

    def on_end(self, record: Record) -> None:
        for line in end_lines(record):
            self._print(line)

    def on_message(self, text: str) -> None:
        self._print(text)


class LiveProgress(Callback):
    """A bar with the current figures below the finished epochs' lines."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
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
        for line in start_lines(record):
            self._console.print(line, highlight=False)
        total = record["epochs"] * record["steps_per_epoch"]
        self._task = self._progress.add_task("searching", total=total, completed=record["step"], figures="")
        self._progress.start()

    def on_step(self, record: Record) -> None:
        if self._task is not None:
            self._progress.update(
                self._task, completed=record["step"], description=_epoch_of(record), figures=_figures(record)
            )

    def on_epoch(self, record: Record) -> None:
        self._console.print(epoch_line(record), highlight=False)
        if self._task is not None:
            self._progress.update(self._task, completed=record["step"])

    def on_end(self, record: Record) -> None:
        self.close()
        for line in end_lines(record):
            self._console.print(line, highlight=False)

    def on_message(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def close(self) -> None:
        self._progress.stop()


def default_progress() -> Callback:
    """`LiveProgress` where standard output is a terminal, `PlainProgress` elsewhere."""
    return LiveProgress() if sys.stdout.isatty() else PlainProgress()


def start_lines(record: Record) -> list[str]:
    """What a person should know before the first step."""
    low, high = record["reachable_range_ms"]
    chosen = "the middle of the range" if record["target_is_midpoint"] else "given"
    return [
        f"run {record['output']}",
        f"space {record['space']}, data {record['data']}: {record['train_images']} training and "
        f"{record['held_out_images']} held-out images, {record['num_classes']} classes",
        f"engine {record['engine']} on {record['device']}, {record['threads']} CPU threads, seed {record['seed']}",
        f"reachable latency {low:.4g} to {high:.4g} ms by the table",
        f"target {record['target_latency_ms']:.4f} ms ({chosen})",
        f"{record['epochs']} epochs ({record['warmup_epochs']} warm-up) of {record['steps_per_epoch']} steps"
        + (f", going on at step {record['step']}" if record["step"] else ""),
    ]


def step_line(record: Record) -> str:
    return f"{_epoch_of(record)} step {record['step']}  {_figures(record)}"


def epoch_line(record: Record) -> str:
    """One epoch in one line, latencies against the target."""
    held_out = record["held_out_accuracy"]
    parts = [
        f"{_epoch_of(record)} done",
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


def _epoch_of(record: Record) -> str:
    return f"epoch {record['epoch'] + 1}/{record['epochs']}"


def _figures(record: Record) -> str:
    return (
        f"loss {record['loss']:.3f}  accuracy {100 * record['accuracy']:.1f} %  "
        f"latency {record['expected_latency_ms']:.4g}/{record['derived_latency_ms']:.4g} "
        f"of {record['target_latency_ms']:.4g} ms  "
        f"{record['images_per_s']:.0f} images/s  {duration(record['time_left_s'])} left"
    )
