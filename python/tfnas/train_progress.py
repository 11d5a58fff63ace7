"""How the records of a training are put into lines."""

from __future__ import annotations

from tfnas.callbacks import Record
from tfnas.progress import Wording, duration, epoch_of


def _start(record: Record) -> list[str]:
    chosen_by = (
        f"best chosen by {record['validation_images']} {record['validation'].replace('_', '-')} images"
        if record["validation_images"]
        else "no validation"
    )
    return [
        f"training {record['output']}",
        f"architecture {record['architecture']}: {record['multiply_adds'] / 1e6:.2f} M multiply-adds, "
        f"{record['parameters'] / 1e6:.3f} M parameters",
        f"data {record['data']}: {record['train_images']} training images, {record['num_classes']} classes; "
        + chosen_by,
        f"{record['precision']} on {record['device']}, {record['threads']} CPU threads, seed {record['seed']}",
        f"{record['epochs']} epochs of {record['steps_per_epoch']} steps of {record['images_per_step']} images"
        + (f", going on at step {record['step']}" if record["step"] else ""),
    ]


def _epoch(record: Record) -> str:
    measured = record["validation"]
    parts = [
        f"{epoch_of(record)} done",
        f"loss {record['loss']:.3f}",
        f"accuracy {100 * record['accuracy']:.1f} %",
    ]
    if measured is not None:
        parts.append(
            f"validation {100 * measured['top1']:.2f} % (best {100 * record['best_accuracy']:.2f} % in epoch "
            f"{record['best_epoch'] + 1})"
        )
    parts.append(f"{record['images_per_s']:.0f} images/s")
    return "  ".join([*parts, f"{duration(record['time_left_s'])} left"])


def _end(record: Record) -> list[str]:
    lines = [f"best weights: epoch {record['best_epoch'] + 1}, written to {record['weights_file']}"]
    test = record["test"]
    if test is not None:
        top5 = f", top-5 {100 * test['top5']:.2f} %" if test["top5"] is not None else ""
        remark = " (chosen by these same images)" if record["selected_by"] == "test" else ""
        lines.append(f"test accuracy: top-1 {100 * test['top1']:.2f} %{top5} of {test['images']} images{remark}")
    return [*lines, f"done after {duration(record['seconds'])}"]


def _figures(record: Record) -> str:
    return (
        f"loss {record['loss']:.3f}  accuracy {100 * record['accuracy']:.1f} %  lr {record['lr']:.4g}  "
        f"{record['images_per_s']:.0f} images/s  {duration(record['time_left_s'])} left"
    )


TRAINING = Wording("training", _start, _epoch, _end, _figures)
