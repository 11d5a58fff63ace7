"""Rows of a benchmark as a table for a terminal and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from tfnas.bench.measure import Row
from tfnas.pictures import new_figure, save_figure


def rows_table(rows: Sequence[Row]) -> Table:
    """One line a row: ms of every competitor, how much faster ours is than the best other one, red where it is not."""
    names = list(rows[0].times_ms)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("case", "phase", "dtype"):
        table.add_column(title, no_wrap=True)
    for title in (*(name.replace("_", " ") for name in names), "ratio", "noise", "GFLOP/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.case,
            row.phase,
            row.dtype,
            *(f"{row.times_ms[name]:.3f}" for name in names),
            Text(f"{row.ratio:.2f}", style="" if row.ratio >= 1 else "red"),
            f"{100 * row.noise:.0f} %",
            f"{row.gflops:.0f}",
        )
    return table


def summary(rows: Sequence[Row]) -> str:
    """How many rows are faster than the best of the others, and the range of the ratio."""
    ratios = sorted(row.ratio for row in rows)
    faster = sum(ratio > 1 for ratio in ratios)
    middle = ratios[len(ratios) // 2]
    return (
        f"faster than the best of the others in {faster} of {len(rows)} rows; ratio {ratios[0]:.2f} to "
        f"{ratios[-1]:.2f}, median {middle:.2f}"
    )


def save_plot(path: str | Path, rows: Sequence[Row], title: str = "") -> None:
    """Bars of every row's times, relative to the fastest other competitor; the suffix decides the format.

    Raises `ModuleNotFoundError` saying what to install where matplotlib is missing.
    """
    names = list(rows[0].times_ms)
    figure = new_figure(10, 1.5 + 0.22 * len(names) * len(rows))
    axis = figure.subplots()
    height = 0.8 / len(names)
    for number, name in enumerate(names):
        places = [index + (number - (len(names) - 1) / 2) * height for index in range(len(rows))]
        shares = [row.times_ms[name] / row.times_ms[row.best_other] for row in rows]
        bars = axis.barh(places, shares, height, label=name.replace("_", " "))
        axis.bar_label(bars, [_milliseconds(row.times_ms[name]) for row in rows], fontsize=6, padding=2)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [f"{row.case}, {row.phase}, {row.dtype}" for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("time relative to the fastest of the others (below 1: ours is faster)")
    axis.set_title(title, fontsize=9)
    axis.margins(x=0.1, y=0.01)
    figure.legend(fontsize=7, loc="outside lower right", ncols=len(names))
    save_figure(path, figure)


def _milliseconds(ms: float) -> str:
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.3g} ms"
