"""Small charts as inline SVG, without scripts: lines, stacked areas, bars, grids of cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# eight colours that stay apart for colour-blind readers too (after Okabe and Ito), light enough for both themes
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a7a00", "#7b5bb5")


@dataclass(frozen=True)
class Series:
    """A named line; `values` may have gaps (None)."""

    name: str
    x: Sequence[float]
    values: Sequence[float | None]
    color: str = COLORS[0]
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Frame:
    """The size of a chart in its own units, margins included."""

    width: int = 440
    height: int = 230
    left: int = 52
    right: int = 12
    top: int = 10
    bottom: int = 38


def line_chart(series: Sequence[Series], x_label: str, y_label: str, frame: Frame | None = None) -> str:
    """Lines over a common x axis, with a legend where there are several."""
    frame = frame or Frame()
    points = [(x, v) for s in series for x, v in zip(s.x, s.values, strict=True) if v is not None]
    if not points:
        return '<p class="none">nothing was measured</p>'
    xs = [x for x, _ in points]
    x_ticks = [t for t in ticks(min(xs), max(xs), frame.width // 50, whole=True) if min(xs) <= t <= max(xs)]
    y_ticks = ticks(min(v for _, v in points), max(v for _, v in points), 5)
    x_of = _scale((min(xs), max(xs)), frame.left, frame.width - frame.right)
    y_of = _scale((y_ticks[0], y_ticks[-1]), frame.height - frame.bottom, frame.top)
    parts = [_axes(frame, x_ticks, y_ticks, x_of, y_of, x_label, y_label)]
    for s in series:
        stroke = f'stroke="{s.color}"' + (' stroke-dasharray="6 4"' if s.dashed else "")
        for run in _runs(s):
            path = " ".join(f"{x_of(x):.1f},{y_of(v):.1f}" for x, v in run)
            parts.append(f'<polyline points="{path}" fill="none" {stroke} stroke-width="2"/>')
            if s.dots or len(run) == 1:
                parts += [f'<circle cx="{x_of(x):.1f}" cy="{y_of(v):.1f}" r="3.5" fill="{s.color}"/>' for x, v in run]
    legend_html = legend([(s.name, s.color) for s in series]) if len(series) > 1 else ""
    return legend_html + _svg(frame.width, frame.height, parts, f"{y_label} over {x_label}")


def stacked_areas(x: Sequence[float], shares: Sequence[Sequence[float]], title: str) -> str:
    """Shares (rows: x, columns: series; each row sums to 1) as areas over each other, from 0 to 1."""
    width, height, top = 200, 96, 16
    low, high = min(x), max(x)
    span = (high - low) or 1.0
    columns = len(shares[0])
    bounds = [[sum(row[:c]) for c in range(columns + 1)] for row in shares]
    if len(x) == 1:
        bounds, x = [bounds[0], bounds[0]], [low, low + 1]

    def point(i: int, c: int) -> str:
        return f"{(x[i] - low) / span * width:.1f},{height - bounds[i][c] * (height - top):.1f}"

    parts = [f'<text x="0" y="11" class="small">{escape(title)}</text>']
    for c in range(columns):
        there = [point(i, c) for i in range(len(x))]
        back = [point(i, c + 1) for i in reversed(range(len(x)))]
        parts.append(f'<polygon points="{" ".join(there + back)}" fill="{color(c)}"/>')
    return _svg(width, height, parts, title)


def grid(
    cells: Sequence[Sequence[str]], rows: Sequence[str], columns: Sequence[str], label: str, titles: list[list[str]]
) -> str:
    """Coloured cells (a colour each), row names at the left, column names below; `titles` show on hovering."""
    size, left, gap = 20, 92, 2
    width = left + size * len(columns) + 8
    height = size * len(rows) + 20
    parts = []
    for r, row in enumerate(cells):
        parts.append(
            f'<text x="{left - 6}" y="{r * size + 14}" text-anchor="end" class="small">{escape(rows[r])}</text>'
        )
        for c, fill in enumerate(row):
            parts.append(
                f'<rect x="{left + c * size}" y="{r * size}" width="{size - gap}" height="{size - gap}" fill="{fill}">'
                f"<title>{escape(titles[r][c])}</title></rect>"
            )
    step = max(1, math.ceil(len(columns) / 12))
    for c in range(0, len(columns), step):
        parts.append(
            f'<text x="{left + c * size + 9}" y="{height - 6}" text-anchor="middle" class="small">'
            f"{escape(columns[c])}</text>"
        )
    return f'<div class="scroll">{_svg(width, height, parts, label, fixed=True)}</div>'


def share_bars(rows: Sequence[tuple[str, Sequence[float]]], label: str) -> str:
    """One horizontal bar per row, cut into shares that sum to 1."""
    width, left, bar, step = 440, 92, 14, 20
    parts = []
    for r, (name, shares) in enumerate(rows):
        parts.append(f'<text x="{left - 6}" y="{r * step + 12}" text-anchor="end" class="small">{escape(name)}</text>')
        x = float(left)
        for c, share in enumerate(shares):
            extent = share * (width - left)
            if extent > 0:
                parts.append(
                    f'<rect x="{x:.1f}" y="{r * step}" width="{extent:.1f}" height="{bar}" fill="{color(c)}">'
                    f"<title>{100 * share:.0f} %</title></rect>"
                )
            x += extent
    return _svg(width, step * len(rows), parts, label)


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Names with a patch of their colour."""
    items = "".join(f'<li><span style="background:{c}"></span>{escape(name)}</li>' for name, c in entries)
    return f'<ul class="legend">{items}</ul>'


def color(index: int) -> str:
    """The colour of candidate or series `index`."""
    return COLORS[index % len(COLORS)]


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` of them; on request `whole` ones only."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / max(1, count - 1)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


class _scale:
    """Maps a range of values linearly to a range of pixels."""

    def __init__(self, values: tuple[float, float], start: float, stop: float) -> None:
        self._low, self._start = values[0], start
        self._factor = (stop - start) / ((values[1] - values[0]) or 1.0)

    def __call__(self, value: float) -> float:
        return self._start + (value - self._low) * self._factor


def _axes(
    frame: Frame,
    x_ticks: list[float],
    y_ticks: list[float],
    x_of: _scale,
    y_of: _scale,
    x_label: str,
    y_label: str,
) -> str:
    right, bottom = frame.width - frame.right, frame.height - frame.bottom
    parts = []
    for value in y_ticks:
        y = y_of(value)
        parts.append(f'<line x1="{frame.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{frame.left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in x_ticks:
        parts.append(f'<text x="{x_of(value):.1f}" y="{bottom + 15}" text-anchor="middle">{value:.4g}</text>')
    parts.append(
        f'<text x="{(frame.left + right) / 2}" y="{frame.height - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = (frame.top + bottom) / 2
    parts.append(
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _runs(series: Series) -> list[list[tuple[float, float]]]:
    """Points without the gaps' None; a line joins over a gap of missing measurements."""
    points = [(x, v) for x, v in zip(series.x, series.values, strict=True) if v is not None]
    return [points] if points else []


def _svg(width: float, height: float, parts: Sequence[str], label: str, fixed: bool = False) -> str:
    size = f' width="{width}" height="{height}"' if fixed else ""
    return (
        f'<svg viewBox="0 0 {width} {height}"{size} role="img" aria-label="{escape(label, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )
