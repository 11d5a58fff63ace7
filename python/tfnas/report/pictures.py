"""The charts over epochs as PNG files (matplotlib, extra `plots`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfnas.pictures import new_figure, save_figure
from tfnas.report.run_data import RunData
from tfnas.report.svg import COLORS, color

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_pictures(run: RunData) -> list[Path]:
    """Write `latency.png`, `accuracy.png` and `operations.png` into the run's folder; returns their paths.

    Raises `ModuleNotFoundError` saying what to install.
    """
    paths = []
    for name, draw in (("latency", _latency), ("accuracy", _accuracy), ("operations", _operations)):
        figure = new_figure(7, 4)
        draw(figure, run)
        path = run.folder / f"{name}.png"
        save_figure(path, figure)
        paths.append(path)
    return paths


def _latency(figure: Figure, run: RunData) -> None:
    axis = figure.subplots()
    x = [e["epoch"] + 1 for e in run.epochs]
    for index, name in enumerate(("expected", "derived")):
        axis.plot(x, [e[f"{name}_latency_ms"] for e in run.epochs], color=COLORS[index], label=name)
    axis.axhline(run.epochs[-1]["target_latency_ms"], color=COLORS[5], linestyle="--", label="target")
    axis.set(xlabel="epoch", ylabel="latency (ms)")
    axis.legend()


def _accuracy(figure: Figure, run: RunData) -> None:
    axis = figure.subplots()
    x = [e["epoch"] + 1 for e in run.epochs]
    axis.plot(x, [100 * e["accuracy"] for e in run.epochs], color=COLORS[0], label="training images")
    held_out: list[dict[str, Any]] = [e for e in run.epochs if e["held_out_accuracy"] is not None]
    axis.plot(
        [e["epoch"] + 1 for e in held_out],
        [100 * e["held_out_accuracy"] for e in held_out],
        marker="o",
        color=COLORS[1],
        label="held-out images",
    )
    axis.set(xlabel="epoch", ylabel="supernet accuracy (%)")
    axis.legend()


def _operations(figure: Figure, run: RunData) -> None:
    axis = figure.subplots()
    strongest = run.strongest()
    for layer in run.space.layers:
        for e, choice in zip(run.epochs, strongest, strict=True):
            axis.barh(
                layer.index + 1,
                1,
                left=e["epoch"] + 0.5,
                color=color(choice[layer.index]),
                edgecolor="white",
                linewidth=0.5,
            )
    names = {c: candidate.name for layer in run.space.layers for c, candidate in enumerate(layer.candidates)}
    for c, name in sorted(names.items()):
        axis.barh(0, 0, color=color(c), label=name)
    axis.set(xlabel="epoch", ylabel="layer", title="strongest operation", ylim=(len(run.space.layers) + 0.6, 0.4))
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
