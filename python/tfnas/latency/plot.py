"""Latency curves as pictures: rows of blocks for a terminal, a PNG with error bars (matplotlib, extra `plots`)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from tfnas.latency.lut import Curve, FloatArray
from tfnas.pictures import new_figure, save_figure
from tfnas.space import OpKey

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-:=+*#"
_SERIES = 24
_TITLE_CHARACTERS = 12  # an inch, at the title's size
# half of the 95 % confidence interval of a median, in standard deviations / sqrt(samples)
_HALF_WIDTH = 1.96 * 1.2533


def error_bars(curve: Curve) -> FloatArray:
    """Half of the 95 % confidence interval of every knot's median relative to it [K]; NaN where it is not known."""
    known = curve.samples > 0
    return np.where(known, _HALF_WIDTH * curve.rel_stdev / np.sqrt(np.maximum(curve.samples, 1)), np.nan)


def sparkline(curve: Curve, columns: int = _SERIES, *, ascii_only: bool = False) -> str:
    """A curve between its least and greatest knot as a row of blocks, or of the like in ASCII."""
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    widths = np.arange(curve.widths[0], curve.widths[-1] + 1)
    widths = widths[curve.covers(widths)]
    picked = widths[np.linspace(0, widths.size - 1, min(columns, widths.size)).round().astype(np.int64)]
    latency_ms = curve.latencies_ms(picked)
    low, span = latency_ms.min(), np.ptp(latency_ms)
    levels = np.zeros(picked.size) if span == 0 else (latency_ms - low) / span * (len(blocks) - 1)
    return "".join(blocks[round(float(level))] for level in levels)


def curves_table(curves: Mapping[OpKey, Curve], *, ascii_only: bool = False) -> Table:
    """One row per curve: widths, knots, latency in ms, error bar of its medians (median over knots), shape."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("curve", no_wrap=True)
    for title in ("kind", "widths", "knots", "ms", "+- %" if ascii_only else "± %"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("latency over width", no_wrap=True)
    for key, curve in curves.items():
        bars = error_bars(curve)
        known = bars[np.isfinite(bars)]
        table.add_row(
            str(key).removeprefix("mbinvres_"),
            curve.kind if curve.kind == "linear" else f"{curve.kind} {curve.period}",
            f"{curve.widths[0]}-{curve.widths[-1]}",
            str(curve.widths.size),
            f"{curve.latency_ms.min():.4g}-{curve.latency_ms.max():.4g}",
            f"{100 * np.median(known):.1f}" if known.size else "?",
            sparkline(curve, ascii_only=ascii_only),
        )
    return table


def save_plot(path: str | Path, curves: Mapping[OpKey, Curve], title: str = "") -> None:
    """Draw curves with the error bars of their knots into a picture; the suffix decides the format (PNG, SVG, PDF).

    Raises `ModuleNotFoundError` saying what to install.
    """
    save_figure(path, curves_figure(curves, title))


def curves_figure(curves: Mapping[OpKey, Curve], title: str = "") -> Figure:
    """One panel per shape (resolution, channels, stride); the unaligned widths of a sawtooth are dotted."""
    panels: dict[tuple[int, int, int, int], list[OpKey]] = {}
    for key in curves:
        panels.setdefault((key.resolution, key.in_channels, key.out_channels, key.stride), []).append(key)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    width_inches = 5.5 * columns
    figure = new_figure(width_inches, 3.8 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (shape, keys) in zip(axes, panels.items(), strict=False):
        for number, key in enumerate(keys):
            _draw(axis, curves[key], f"C{number}", f"k{key.kernel_size} se{key.se_channels} {key.act}")
        resolution, in_channels, out_channels, stride = shape
        axis.set_title(f"{resolution} px, {in_channels} to {out_channels} channels, stride {stride}", fontsize=9)
        axis.set(xlabel="width (channels)", ylabel="latency (ms)", ylim=(0, None))
        axis.legend(fontsize=7)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    # names of files may be long and hold dollar signs
    lines = textwrap.fill(title, int(_TITLE_CHARACTERS * width_inches))
    figure.suptitle(lines, fontsize=10, parse_math=False)
    return figure


def _draw(axis: Axes, curve: Curve, color: str, label: str) -> None:
    bars = np.nan_to_num(error_bars(curve)) * curve.latency_ms
    for widths, style in _runs(curve):
        axis.plot(widths, curve.latencies_ms(widths), linewidth=1, linestyle=style, color=color)
    axis.errorbar(curve.widths, curve.latency_ms, bars, fmt=".", markersize=3, capsize=2, color=color, label=label)


def _runs(curve: Curve) -> Iterable[tuple[np.ndarray, str]]:
    """Widths to join by a line, and its style: dotted for those of a sawtooth that are not aligned."""
    widths = np.arange(curve.widths[0], curve.widths[-1] + 1)
    widths = widths[curve.covers(widths)]
    if curve.kind == "sawtooth":
        aligned = widths % curve.period == 0
        return (widths[aligned], "-"), (widths[~aligned], ":")
    return ((widths, "-"),)
