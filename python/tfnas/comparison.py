"""What several searches found, side by side: a table for the terminal, JSON, Markdown, a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from tfnas.architecture import load_architecture
from tfnas.callbacks import Record
from tfnas.config_io import CONFIG_FILE, SEARCH
from tfnas.files import write_text_atomically
from tfnas.pictures import new_figure, save_figure
from tfnas.run import ARCHITECTURE_FILE, METRICS_FILE, TRAINING_FOLDER, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARISON_STEM = "comparison"


@dataclass(frozen=True)
class TargetRow:
    """What one search found; latencies in ms, accuracies as shares (0 to 1), None where not measured.

    `inherited_accuracy` is that of the derived network on held-out images with the supernet's weights;
    `trained_accuracy` the test accuracy after `tfnas train --run FOLDER`. `met`: within the tolerance below the target.
    """

    folder: str
    target_latency_ms: float
    lut_latency_ms: float
    measured_latency_ms: float | None
    multiply_adds: int
    parameters: int
    depths: list[int]
    inherited_accuracy: float | None
    trained_accuracy: float | None
    repaired: bool
    met: bool


def read_row(folder: Path) -> TargetRow | None:
    """The row of a finished search's folder, None where the search has not ended; `ValueError` names a damaged one."""
    if not (folder / ARCHITECTURE_FILE).is_file() or not (folder / METRICS_FILE).is_file():
        return None
    records = read_metrics(folder / METRICS_FILE)
    if not records or records[-1]["kind"] != "end":
        return None
    try:
        return _row(folder, records[-1])
    except (LookupError, TypeError) as error:
        raise ValueError(
            f"{folder}: its records lack what a comparison shows ({type(error).__name__}: {error})"
        ) from error


def _row(folder: Path, end: Record) -> TargetRow:
    config = SEARCH.load(folder / CONFIG_FILE)
    arch, facts = load_architecture(folder / ARCHITECTURE_FILE)
    target, latency = facts["target_latency_ms"], facts["lut_latency_ms"]
    return TargetRow(
        folder=folder.name,
        target_latency_ms=target,
        lut_latency_ms=latency,
        measured_latency_ms=facts.get("measured_latency_ms"),
        multiply_adds=end["multiply_adds"],
        parameters=end["parameters"],
        depths=[len(ops) for ops in arch.stages],
        inherited_accuracy=end.get("inherited_accuracy"),
        trained_accuracy=_trained_accuracy(folder / TRAINING_FOLDER / METRICS_FILE),
        repaired=facts["repaired"],
        met=(1 - config.tolerance) * target <= latency <= target,
    )


def save_comparison(folder: Path, rows: Sequence[TargetRow]) -> list[str]:
    """Write `comparison.json`, `.md` and, with matplotlib, `.png` into `folder`; returns remarks for people."""
    stem = folder / COMPARISON_STEM
    values = {"schema_version": 1, "targets": [dataclasses.asdict(row) for row in rows]}
    write_text_atomically(stem.with_suffix(".json"), json.dumps(values, indent=1) + "\n")
    write_text_atomically(stem.with_suffix(".md"), comparison_markdown(rows))
    try:
        figure = new_figure(7, 4.5)
    except ModuleNotFoundError as error:
        return [f"no {COMPARISON_STEM}.png: {error}"]
    _draw(figure, rows)
    save_figure(stem.with_suffix(".png"), figure)
    return []


def comparison_table(rows: Sequence[TargetRow]) -> Table:
    """The rows for a terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles, lines = _cells(rows)
    for title in titles:
        table.add_column(title, justify="left" if title == "folder" else "right")
    for line in lines:
        table.add_row(*line)
    return table


def comparison_markdown(rows: Sequence[TargetRow]) -> str:
    """The rows as a Markdown table."""
    titles, lines = _cells(rows)
    table = [titles, ["-"] * len(titles), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def _cells(rows: Sequence[TargetRow]) -> tuple[list[str], list[list[str]]]:
    titles = ["folder", "target ms", "table ms", "measured ms", "M mult-adds", "M params", "depths", "inherited %"]
    trained = any(row.trained_accuracy is not None for row in rows)
    lines = []
    for row in rows:
        line = [
            row.folder,
            f"{row.target_latency_ms:g}",
            f"{row.lut_latency_ms:.4f}{'' if row.met else ' missed'}{' repaired' if row.repaired else ''}",
            "-" if row.measured_latency_ms is None else f"{row.measured_latency_ms:.4f}",
            f"{row.multiply_adds / 1e6:.2f}",
            f"{row.parameters / 1e6:.3f}",
            " ".join(map(str, row.depths)),
            _percent(row.inherited_accuracy),
        ]
        lines.append([*line, _percent(row.trained_accuracy)] if trained else line)
    return ([*titles, "trained %"] if trained else titles), lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def _trained_accuracy(metrics: Path) -> float | None:
    records = read_metrics(metrics) if metrics.is_file() else []
    tests = [record["test"] for record in records if record["kind"] == "end" and record["test"] is not None]
    return tests[-1]["top1"] if tests else None


def _draw(figure: Figure, rows: Sequence[TargetRow]) -> None:
    """Accuracy over latency by the table, a line for each kind of accuracy."""
    axis = figure.subplots()
    kinds = {
        "after training, test images": [row.trained_accuracy for row in rows],
        "supernet's weights, held-out images": [row.inherited_accuracy for row in rows],
    }
    for label, shares in kinds.items():
        points = sorted((row.lut_latency_ms, 100 * y) for row, y in zip(rows, shares, strict=True) if y is not None)
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", label=label)
    for row in rows:
        axis.axvline(row.target_latency_ms, color="0.8", linewidth=0.8, zorder=0)
    axis.set(xlabel="latency by the table (ms); gray: targets", ylabel="accuracy (%)")
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
